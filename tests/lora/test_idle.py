"""python -m pytest tests/lora/test_idle.py"""

import pytest
import torch

from herdling import lora
from herdling.lora import LoraConfig
from herdling.optim import adamw


def test_an_expert_without_a_token_stays_bit_for_bit_and_the_others_move_as_always(make_model):
    """Three steps by hand; in the second, experts 1 and 2 of every tensor have no gradient."""
    results = []
    for spare in (False, True):
        model = make_model()
        adapters = lora.attach(model, LoraConfig(r=2, targets=("experts", "attention")))
        optimizer = adamw.build(model, adamw.AdamWConfig(learning_rate=0.1, weight_decay=0.5))
        if spare:
            lora.spare_idle_experts(optimizer, model)
        history = []
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for _, f in adapters.factors().values():
                for p in (f.A, f.B):
                    p.grad = torch.randn(p.shape, generator=generator)
                    if p.dim() == 3 and step == 1:
                        p.grad[1:3] = 0
            optimizer.step()
            history.append([p.detach().clone() for _, f in adapters.factors().values() for p in (f.A, f.B)])  # fmt: skip
        results.append((history, optimizer))
    (always, _), (spared, optimizer) = results
    checked = 0
    for i, last in enumerate(spared[2]):
        torch.testing.assert_close(spared[0][i], always[0][i], atol=0, rtol=0)
        if last.dim() != 3:
            torch.testing.assert_close(last, always[2][i], atol=0, rtol=0)
            continue
        assert torch.equal(spared[1][i][1:3], spared[0][i][1:3])
        assert (always[1][i][1:3] != always[0][i][1:3]).all()  # torch alone would have moved them
        assert (last[1:3] != spared[1][i][1:3]).all()  # and they go on later
        rest = [0, *range(3, len(last))]
        torch.testing.assert_close(last[rest], always[2][i][rest], atol=0, rtol=0)
        checked += 1
    assert checked == 2 * 2 * 2


@pytest.mark.parametrize("bits", [32, 8])
def test_real_tokens_leave_idle_experts_alone(make_model, ids, bits):
    """Decay, averages of an earlier step and two micro-batches: only experts with a token move."""
    model = make_model()
    adapters = lora.attach(model, LoraConfig(r=16, targets=("experts",)))
    optimizer = adamw.build(
        model, adamw.AdamWConfig(learning_rate=0.1, weight_decay=0.5, state_bits=bits)
    )
    lora.spare_idle_experts(optimizer, model)
    chosen = {}
    for m in model.modules():
        if type(m).__name__ == "Router":
            m.register_forward_hook(lambda m, _, out: chosen.setdefault(m, []).append(out[0].flatten()))  # fmt: skip
    for _ in range(2):  # of the first step B alone has a gradient
        model(ids).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = {p: [t.clone() for t in (f.A, f.B, *states(optimizer, f))] for p, (_, f) in adapters.factors().items()}  # fmt: skip
    assert len(kept) == 2 * len(chosen)
    chosen.clear()
    for at in (0, 2):
        model(ids[:1, at : at + 2]).sum().backward()
    optimizer.step()
    for layer, path in enumerate(p for p in kept if p.endswith("down_proj")):
        used = torch.cat(list(chosen.values())[layer]).unique().tolist()
        _, f = adapters.factors()[path]
        assert len(used) < len(f.A)
        for before, after in zip(kept[path], (f.A, f.B, *states(optimizer, f)), strict=True):
            moved = (before != after).flatten(1).any(1).nonzero().flatten().tolist()
            assert moved == used if after is f.A or after is f.B else set(moved) <= set(used)


def states(optimizer, factors):
    """The averages of both factors, or their codes and scales."""
    tensors = [t for p in (factors.A, factors.B) for t in optimizer.state[p].values()]
    return [t for t in tensors if t.dim() > 1]
