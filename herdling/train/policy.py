"""Policy gradients on graded rollouts: GRPO, Dr. GRPO, DAPO, GSPO and CISPO behind one config.

Each rollout has one advantage A, relative to its group. With r = pi / pi_old of a token (or of the
whole sequence), the objective of a token is min(r A, clip(r, 1 - low, 1 + high) A), and the losses
differ in what they average over:

    dapo      all tokens of the batch alike                     arXiv 2503.14476
    grpo      tokens of a sequence, then sequences              arXiv 2402.03300
    dr_grpo   tokens over a constant length a sequence          arXiv 2503.20783
    gspo      r is the sequence's, exp(mean log ratio)          arXiv 2507.18071
    cispo     -sg(clip(r)) A log pi: no token loses its gradient  arXiv 2506.13585

pi_old is the trainer's own policy when the rollouts came in; while there has been no update since, it
is pi itself and r is 1. What the sampler drew from differs from it by rounding, and by routes in a
mixture of experts: `correction` weighs tokens by pi_old / pi_sampler, cut at `cap` (truncated
importance sampling).

With examples beside the rollouts (InstructGPT's ptx term, arXiv 2203.02155 eq. 2), what is not played is
not forgotten.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from herdling.data.packing import IGNORE
from herdling.errors import ConfigError
from herdling.kernels.cross_entropy import log_probs
from herdling.train.config import PolicyConfig
from herdling.train.losses import Batch, Numbers
from herdling.train.replay import replaying


def advantages(grades: list[float], scaled: bool) -> list[float]:
    """Grades less the group's mean, perhaps over its standard deviation; all exactly 0 if equal."""
    if len(set(grades)) <= 1:
        return [0.0] * len(grades)
    values = torch.tensor(grades, dtype=torch.float64)
    values = values - values.mean()
    return (values / values.std() if scaled else values).tolist()


class PolicyLoss:
    """The loss for `fit`, and what its batches weigh.

    A batch has, besides what `next_token` takes, at each place whose label is learnt: `advantages`,
    `sampler_logprobs`, perhaps `old_logprobs` and `reference_logprobs`, all (B, T) float32; the number
    of the `rollout` (B, T) int64 it belongs to, counted from 0 in the batch; and perhaps `experts`
    (L, B * T, k) int16, -1 where unknown. Rows of tuning examples may stand beside those of rollouts
    (`rollouts.pack.beside`): their `rollout` is -1, and `config.sft` times their mean loss is added.
    """

    def __init__(self, config: PolicyConfig, longest: int = 0) -> None:
        """`longest`: tokens that dr_grpo divides a sequence by, the most that one may have."""
        if config.loss == "dr_grpo" and longest < 1:
            raise ConfigError(
                f"longest is {longest}; loss dr_grpo needs the most tokens of a reply"
            )
        self.config, self.longest = config, longest

    def weight(self, batch: Batch) -> float:
        """What the sum over a batch is divided by: its rollouts' tokens or sequences."""
        learnt = (batch["labels"] != IGNORE) & (batch["rollout"] >= 0)
        if self.config.loss in ("dapo", "cispo"):
            return float(learnt.sum())
        sequences = len(batch["rollout"][learnt].unique())
        return float(sequences * (self.longest if self.config.loss == "dr_grpo" else 1))

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Numbers]:
        with replaying(model, batch.get("experts"), self.config.replay) as routes:
            logps = token_log_probs(model, batch)
        learnt, played = batch["labels"] != IGNORE, batch["rollout"] >= 0
        at = (learnt & played).nonzero(as_tuple=True)
        tokens = Tokens(
            logps[at],
            batch["advantages"][at],
            batch["sampler_logprobs"][at],
            batch["rollout"][at],
            batch["old_logprobs"][at] if "old_logprobs" in batch else None,
            batch["reference_logprobs"][at] if "reference_logprobs" in batch else None,
        )
        loss, numbers = policy_loss(tokens, self.config, self.longest)
        examples = learnt & ~played
        if examples.any():
            nll, count = -logps[examples].sum(), examples.sum()
            # A sum that is divided by `weight`, as all of the step's losses are.
            loss = loss + self.config.sft * nll / count * self.weight(batch)
            numbers["example_loss"] = (nll.detach(), count)
        if routes.seen is not None:
            numbers["flipped_routes"] = (routes.flipped, routes.seen)
        return loss, numbers


def token_log_probs(model: nn.Module, batch: Batch) -> Tensor:
    """log p of each label (B, T) float32, 0 where there is none."""
    names = ("input_ids", "pixel_values", "positions", "documents")
    inputs: dict[str, Any] = {name: batch[name] for name in names if name in batch}
    return model(**inputs, readout=partial(log_probs, labels=batch["labels"]))


@dataclass(frozen=True)
class Tokens:
    """The learnt tokens of a batch, all (n,)."""

    logps: Tensor
    """Of the policy in training, with its gradient."""
    advantages: Tensor
    sampler: Tensor
    """Log-probs when they were drawn."""
    rollout: Tensor
    """int64: which sequence a token belongs to, from 0 on."""
    old: Tensor | None = None
    """Log-probs of the policy when the rollouts came in; None: the present one's."""
    reference: Tensor | None = None


def policy_loss(
    tokens: Tokens, config: PolicyConfig, longest: int = 0
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The sum over tokens to be divided by `PolicyLoss.weight`, and figures as (sum, weight)."""
    logps, low, high = tokens.logps, 1 - config.bounds[0], 1 + config.bounds[1]
    old = logps.detach() if tokens.old is None else tokens.old
    sequences = _Sequences(tokens.rollout)
    log_ratio = logps - old
    if config.loss == "gspo":
        log_ratio = sequences.mean(log_ratio)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(low, high)
    if config.loss == "cispo":
        losses = -clipped.detach() * tokens.advantages * logps
    else:
        losses = -torch.min(ratio * tokens.advantages, clipped * tokens.advantages)
    importance = _importance(old.detach() - tokens.sampler, sequences, config)
    losses = losses * importance
    ones = torch.ones_like(logps)
    gap = (logps - tokens.sampler).detach()
    numbers = {
        "log_ratio": (gap.abs().sum(), ones.sum()),
        "entropy": (-tokens.sampler.sum(), ones.sum()),
        "clipped": ((ratio != clipped).float().sum(), ones.sum()),
        "importance": (importance.sum(), ones.sum()),
    }
    if tokens.reference is not None:
        # k3 of http://joschu.net/blog/kl-approx.html: never negative, unbiased on policy.
        away = tokens.reference - logps
        divergence = away.exp() - away - 1
        losses = losses + config.kl * divergence
        numbers["kl"] = (divergence.detach().sum(), ones.sum())
    if config.loss in ("grpo", "gspo"):
        losses = losses / sequences.lengths
    return losses.sum(), numbers


class _Sequences:
    """Sums over the tokens of a sequence, given back to each of them."""

    def __init__(self, rollout: Tensor) -> None:
        self.rollout = rollout
        self.count = int(rollout.max()) + 1 if len(rollout) else 0
        self.lengths = self.total(torch.ones_like(rollout, dtype=torch.float32))

    def total(self, values: Tensor) -> Tensor:
        sums = values.new_zeros(self.count).index_add(0, self.rollout, values)
        return sums[self.rollout]

    def mean(self, values: Tensor) -> Tensor:
        return self.total(values) / self.lengths


def _importance(log_ratio: Tensor, sequences: _Sequences, config: PolicyConfig) -> Tensor:
    """Weights (n,) of pi_old / pi_sampler, a constant for the gradient."""
    if config.correction == "none":
        return torch.ones_like(log_ratio)
    if config.correction.startswith("sequence"):
        log_ratio = sequences.total(log_ratio)
    ratio = log_ratio.exp()
    if config.correction.endswith("mask"):
        return torch.where(ratio > config.cap, 0.0, ratio)
    return ratio.clamp(max=config.cap)
