"""python -m pytest tests/lora/test_idle.py"""

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


def test_real_tokens_leave_idle_experts_alone(make_model, ids):
    model = make_model()
    adapters = lora.attach(model, LoraConfig(r=2, targets=("experts",)))
    optimizer = adamw.build(model, adamw.AdamWConfig(learning_rate=0.1, weight_decay=0.5))
    lora.spare_idle_experts(optimizer, model)
    before = {path: f.B.detach().clone() for path, (_, f) in adapters.factors().items()}
    chosen = []
    for m in model.modules():
        if type(m).__name__ == "Router":
            m.register_forward_hook(lambda _, __, out: chosen.append(out[0].flatten()))
    model(ids[:1, :2]).sum().backward()
    optimizer.step()
    for layer, path in enumerate(p for p in before if p.endswith("down_proj")):
        moved = (before[path] != adapters.factors()[path][1].B).flatten(1).any(1)
        assert moved.nonzero().flatten().tolist() == chosen[layer].unique().tolist()
        assert not moved.all()
