"""Routing replay: the sampler's experts with the trainer's scores, and how far the two had come apart."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from herdling.errors import Error
from herdling.infer.lm import LM
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.model.llama import Router, build
from herdling.rollouts.pack import pack
from herdling.rollouts.play import Game, play
from herdling.tasks.registry import create
from herdling.train.config import PolicyConfig
from herdling.train.health import Routing
from herdling.train.policy import PolicyLoss
from herdling.train.replay import replaying


@pytest.fixture(scope="module")
def lm() -> LM:
    tok = Tokenizer.train(["what is 12 + 30? sort 4 7 1 " * 4], 320)
    config = preset("nano", vision=False, vocab_size=len(tok), interleave_moe_layer_step=1)
    return LM(initialize(build(config), seed=1, std=0.15).eval(), tok)


def routers(model) -> list[Router]:
    return [m for m in model.modules() if isinstance(m, Router)]


def watched(model, ids, experts=None, replay=True):
    """Chosen experts and gates of every layer, and the comparison."""
    seen: list[tuple] = []
    with replaying(model, experts, replay) as routes:
        hooks = [
            r.register_forward_hook(lambda _, __, out: seen.append(out)) for r in routers(model)
        ]
        logits = model(ids)
        for hook in hooks:
            hook.remove()
    return logits, seen, routes


def test_tokens_go_where_they_are_sent_with_the_trainers_own_scores(lm):
    ids = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    L, E = len(routers(lm.model)), lm.config.text.num_local_experts
    experts = torch.randint(0, E, (L, 18, 1), generator=torch.Generator().manual_seed(1))
    experts[:, 4] = -1
    free, own, _ = watched(lm.model, ids)
    logits, seen, routes = watched(lm.model, ids, experts.to(torch.int16))
    for layer, (chosen, gates, scores) in enumerate(seen):
        known = experts[layer, :, 0] >= 0
        assert torch.equal(chosen[known], experts[layer][known])
        assert torch.equal(chosen[~known], scores.topk(1).indices[~known])
        assert torch.equal(gates, torch.sigmoid(scores.gather(1, chosen)))
    assert not torch.allclose(logits, free)
    flips = sum(
        int((c != e).sum()) for (c, _, _), e in zip(own[:1], experts[:1, :, :], strict=True)
    )
    assert routes.seen == L * 17
    assert 0 < int(routes.flipped) <= L * 17
    assert (
        flips - 1 <= int(routes.found[0][0]) <= flips
    )  # the first layer's choice has no replay before it
    # Only compared: nothing changes, and the count is that of the plain choice.
    same, _, compared = watched(lm.model, ids, experts, replay=False)
    assert torch.equal(same, free)
    want = sum(int((c != e)[e >= 0].sum()) for (c, _, _), e in zip(own, experts, strict=True))
    assert int(compared.flipped) == want
    assert not any(r._forward_hooks for r in routers(lm.model))


def test_the_router_learns_through_the_replayed_gates(lm):
    model = copy.deepcopy(lm.model)
    router = routers(model)[0]
    x = torch.randn(6, router.in_features)
    want = torch.tensor([[1], [0], [2], [1], [3], [0]])
    with replaying(_Only(router), want[None]):
        _, gates, _ = router(x)
    gates.pow(2).sum().backward()
    got = router.weight.grad.clone()
    router.weight.grad = None
    F.linear(x, router.weight).gather(1, want).sigmoid().pow(2).sum().backward()
    torch.testing.assert_close(got, router.weight.grad)
    assert got.abs().max() > 0


class _Only(torch.nn.Module):
    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router


def test_loads_are_counted_where_tokens_really_go(lm):
    ids = torch.zeros(1, 8, dtype=torch.int64)
    experts = torch.full((len(routers(lm.model)), 8, 1), 2)
    routing = Routing(lm.model)
    with routing, routing.recording(), replaying(lm.model, experts):
        lm.model(ids)
    routing.finish()
    for share in routing.share:
        assert share.tolist() == [0, 0, 1, 0]


def test_refusals(lm):
    ids = torch.zeros(1, 8, dtype=torch.int64)
    L = len(routers(lm.model))
    with pytest.raises(Error, match=f"experts of 1 layers, the model {L}"), replaying(lm.model, torch.zeros(1, 8, 1)):  # fmt: skip
        pass
    with pytest.raises(Error, match=r"\(7, 1\) of a layer"), replaying(lm.model, torch.zeros(L, 7, 1)):  # fmt: skip
        lm.model(ids)
    assert not any(r._forward_hooks for r in routers(lm.model))


def test_replay_brings_a_bf16_sampler_near_its_fp32_trainer(lm):
    """Four MoE layers, one of 64 experts a token: some flip, and without their flips the gap is a
    fifth at most. With few experts ties are rare and rounding alone makes most of it (docs/rl.md)."""
    shape = replace(lm.config, text=replace(lm.config.text, num_local_experts=64))
    lm = LM(initialize(build(shape), seed=1, std=0.1).eval(), lm.tokenizer)
    assert len(routers(lm.model)) == 4
    sampler = LM(copy.deepcopy(lm.model).to(torch.bfloat16), lm.tokenizer)
    task = create("arithmetic")
    games = [Game(task, task.item(i, "train"), seed=i) for i in range(24)]
    rollouts = play(sampler, games, max_tokens=24, temperature=1.0, experts=True)
    batch = pack(rollouts, [1.0] * len(rollouts), 128, lm.tokenizer.pad)
    gaps, flips = {}, {}
    for replay in (False, True):
        loss = PolicyLoss(PolicyConfig(replay=replay))
        _, numbers = loss(lm.model, batch)
        gaps[replay] = (numbers["log_ratio"][0] / numbers["log_ratio"][1]).item()
        flips[replay] = (numbers["flipped_routes"][0] / numbers["flipped_routes"][1]).item()
    assert flips[False] > 0
    assert gaps[False] >= 5 * gaps[True]
    # The trainer against itself: no flip, and nothing but rounding between.
    same = play(lm, games, max_tokens=24, temperature=1.0, experts=True)
    _, numbers = PolicyLoss(PolicyConfig())(lm.model, pack(same, [1.0] * 24, 128, lm.tokenizer.pad))
    assert numbers["flipped_routes"][0] == 0
    assert numbers["log_ratio"][0] / numbers["log_ratio"][1] < 1e-5


def test_replay_with_several_experts_a_token(lm):
    config = replace(lm.config.text, num_experts_per_tok=2)
    model = initialize(build(replace(lm.config, text=config)), seed=1, std=0.15)
    ids = torch.randint(0, 250, (1, 9))
    _, own, _ = watched(model, ids)
    # The same two in the other order are the same experts.
    experts = torch.stack([chosen.flip(-1) for chosen, _, _ in own])
    _, seen, routes = watched(model, ids, experts)
    assert int(routes.flipped) == 0
    for (_, gates, _), (_, before, _) in zip(seen, own, strict=True):
        torch.testing.assert_close(gates, before.flip(-1))
