"""Policy losses: against references of a few lines, against numbers worked out by hand, and at zero.

`tests/clients/test_trl.py` compares them with TRL's.
"""

import math

import pytest
import torch
from torch import Tensor

from herdling.errors import ConfigError
from herdling.train.config import PolicyConfig
from herdling.train.policy import PolicyLoss, Tokens, advantages, policy_loss

KINDS = ("dapo", "grpo", "dr_grpo", "gspo", "cispo")
CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
LONGEST = 7


def made(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tokens:
    """Three sequences of 5, 2 and 4 tokens, interleaved; ratios on both sides of every clip."""
    g = torch.Generator().manual_seed(seed)
    rollout = torch.tensor([0, 2, 0, 1, 2, 0, 0, 2, 1, 0, 2])
    old = -torch.rand(11, generator=g, dtype=dtype) * 3
    logps = (old + 0.5 * torch.randn(11, generator=g, dtype=dtype)).requires_grad_()
    return Tokens(
        logps,
        torch.tensor([1.3, -0.7, 0.4], dtype=dtype)[rollout],
        old + 0.6 * torch.randn(11, generator=g, dtype=dtype),
        rollout,
        old,
        old + 0.3 * torch.randn(11, generator=g, dtype=dtype),
    )


def reference(t: Tokens, config: PolicyConfig) -> Tensor:
    """The mean loss as the papers write it, a sequence and a token at a time."""
    low, high = config.bounds
    of_sequence, lengths = [], []
    for s in range(3):
        mine = (t.rollout == s).nonzero()[:, 0].tolist()
        whole = sum(t.old[i] - t.sampler[i] for i in mine).exp()
        mean_ratio = (sum(t.logps[i] - t.old[i] for i in mine) / len(mine)).exp()
        losses = []
        for i in mine:
            A, r = t.advantages[i], (t.logps[i] - t.old[i]).exp()
            r = mean_ratio if config.loss == "gspo" else r
            if config.loss == "cispo":
                loss = -min(max(r.item(), 1 - low), 1 + high) * A * t.logps[i]
            else:
                loss = -torch.minimum(r * A, r.clamp(1 - low, 1 + high) * A)
            w = (t.old[i] - t.sampler[i]).exp() if "token" in config.correction else whole
            if "truncate" in config.correction:
                loss = loss * min(w.item(), config.cap)
            elif "mask" in config.correction:
                loss = loss * (w.item() if w <= config.cap else 0.0)
            d = t.reference[i] - t.logps[i]
            losses.append(loss + config.kl * (d.exp() - d - 1))
        of_sequence.append(sum(losses))
        lengths.append(len(mine))
    if config.loss in ("grpo", "gspo"):
        return sum(s / n for s, n in zip(of_sequence, lengths, strict=True)) / 3
    if config.loss == "dr_grpo":
        return sum(of_sequence) / (3 * LONGEST)
    return sum(of_sequence) / sum(lengths)


def weight(config: PolicyConfig, t: Tokens) -> float:
    batch = {"labels": torch.zeros_like(t.rollout), "rollout": t.rollout}
    return PolicyLoss(config, LONGEST).weight(batch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_losses_and_gradients_are_those_of_the_papers(kind, correction, kl):
    clip = (0.2, 0.28) if kind == "gspo" else None  # its own would clip all that is here
    config = PolicyConfig(loss=kind, correction=correction, kl=kl, cap=3.0, clip=clip)
    for seed in range(3):
        ours, theirs = made(seed), made(seed)
        total, _ = policy_loss(ours, config, LONGEST)
        got = total / weight(config, ours)
        want = reference(theirs, config)
        assert got.item() == pytest.approx(want.item(), abs=1e-9)
        got.backward()
        want.backward()
        torch.testing.assert_close(ours.logps.grad, theirs.logps.grad, atol=1e-9, rtol=0)
        assert ours.logps.grad.abs().max() > 1e-3


def test_a_case_worked_out_by_hand():
    """Two sequences: one token that doubled its probability, two that halved it; A is 1 and -1."""
    two = math.log(2)
    tokens = Tokens(
        logps=torch.tensor([-1.0, -2.0, -3.0], requires_grad=True),
        advantages=torch.tensor([1.0, -1.0, -1.0]),
        sampler=torch.tensor([-1.0 - two, -2.0 + two, -3.0 + two]),
        rollout=torch.tensor([0, 1, 1]),
        old=torch.tensor([-1.0 - two, -2.0 + two, -3.0 + two]),
    )
    # r = 2, 1/2, 1/2. Clipped to at most 1.28: -min(2, 1.28) = -1.28. With A = -1 and r below
    # 0.8: -min(-0.5, -0.8) = 0.8, without a gradient, as the policy has moved far enough.
    want = {"dapo": (-1.28 + 0.8 + 0.8) / 3, "grpo": (-1.2 + (0.8 + 0.8) / 2) / 2,
            "dr_grpo": (-1.2 + 0.8 + 0.8) / (2 * LONGEST),
            "gspo": (-(1 + 4e-4) + (1 - 3e-4)) / 2,
            # -sg(min(r, 5)) A log p: 2 * 1 and twice 0.5 * log p
            "cispo": (2 * 1.0 + 0.5 * -2.0 + 0.5 * -3.0) / 3}  # fmt: skip
    for kind, value in want.items():
        config = PolicyConfig(loss=kind)
        total, numbers = policy_loss(tokens, config, LONGEST)
        assert (total / weight(config, tokens)).item() == pytest.approx(value, abs=1e-6), kind
        if kind == "dapo":
            assert numbers["clipped"][0] == 3
            assert numbers["entropy"][0].item() == pytest.approx(6 - two, abs=1e-6)
            assert numbers["log_ratio"][0].item() == pytest.approx(3 * two, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_group_without_differences_has_exactly_no_gradient(kind, correction):
    config = PolicyConfig(loss=kind, correction=correction)
    tokens = made(dtype=torch.float32)
    flat = torch.tensor(advantages([0.3, 0.3, 0.3], config.scaled), dtype=torch.float32)
    total, _ = policy_loss(
        Tokens(tokens.logps, flat[tokens.rollout], tokens.sampler, tokens.rollout, tokens.old),
        config,
        LONGEST,
    )
    total.backward()
    assert total == 0
    assert torch.equal(tokens.logps.grad, torch.zeros(11))


def test_on_policy_the_gradient_is_that_of_reinforce():
    """r is 1 where nothing has been updated: grad = -A, times the weight for the sampler's rounding."""
    tokens = made(1)
    fresh = Tokens(tokens.logps, tokens.advantages, tokens.logps.detach(), tokens.rollout)
    for kind in KINDS:
        tokens.logps.grad = None
        total, numbers = policy_loss(fresh, PolicyConfig(loss=kind), LONGEST)
        total.backward()
        lengths = torch.tensor([5.0, 2.0, 4.0])[tokens.rollout] if kind in ("grpo", "gspo") else 1.0
        torch.testing.assert_close(tokens.logps.grad, -tokens.advantages / lengths)
        assert numbers["log_ratio"][0] == numbers["clipped"][0] == 0


def test_advantages_are_relative_to_the_group():
    assert advantages([1.0, 0.0, 0.0, 1.0], False) == [0.5, -0.5, -0.5, 0.5]
    assert advantages([1.0, 0.0], True) == pytest.approx([1 / math.sqrt(2), -1 / math.sqrt(2)])
    assert advantages([0.1] * 8, True) == [0.0] * 8  # 0.1 has no exact mean
    assert advantages([0.25], True) == [0.0]


def test_refusals():
    for name, value in (("clip", (0.0, 0.2)), ("cap", 0.5), ("kl", -1.0), ("kl", math.inf),
                        ("sft", -0.1), ("sft", math.nan)):  # fmt: skip
        with pytest.raises(ConfigError, match=f"policy.{name}"):
            PolicyConfig(**{name: value})
    with pytest.raises(ConfigError, match="dr_grpo"):
        PolicyLoss(PolicyConfig(loss="dr_grpo"))
