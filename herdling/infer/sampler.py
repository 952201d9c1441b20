"""From logits to the next token: greedy, or drawn after temperature, top-k, top-p and min-p.

Each request draws from a generator of its own, one uniform number a token, so what else is in the
batch never changes its reply. Log-probs are those of the raw logits: before the penalty, the
temperature and the cuts (as in Meta's `llama4/generation.py`). Left out: typical sampling, presence
and frequency penalties, logit bias, beam search.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from herdling.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The cuts work in the order top-k, top-p, min-p, after the temperature."""

    temperature: float = 0.0
    """0 takes the likeliest token; 1 draws from the model's own distribution."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0 from all."""
    top_p: float = 1.0
    """Keep a token while the mass before it is at most p, so the one that crosses p stays."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one."""
    repetition_penalty: float = 1.0
    """Divides positive (multiplies negative) logits of tokens already in prompt or reply."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature is {self.temperature}; it must be 0 or more, and finite"
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; use 0 for no limit, or 1 and more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p is {self.min_p}; it must be 0 to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(
                f"repetition_penalty is {self.repetition_penalty}; it must be above 0 (1: none)"
            )


def check_seed(seed: int | None) -> None:
    """Raise ConfigError for a seed that torch's generator does not take."""
    if seed is not None and not 0 <= seed < 2**63:
        raise ConfigError(f"seed is {seed}; it must be 0 to 2**63 - 1")


class Sampler:
    """One request's settings, generator, and tokens seen so far."""

    def __init__(self, sampling: Sampling, seed: int | None = 0) -> None:
        """`seed` None draws a fresh one."""
        check_seed(seed)
        self.sampling = sampling
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self._seen: set[int] = set()

    def see(self, ids: Sequence[int]) -> None:
        """Tell the repetition penalty what stands in the text."""
        if self.sampling.repetition_penalty != 1:
            self._seen.update(ids)

    def uniform(self) -> float:
        """The next number of this request's own sequence, in [0, 1)."""
        return torch.rand((), dtype=torch.float64, generator=self._generator).item()

    def penalise(self, row: Tensor) -> None:
        """Apply the repetition penalty to logits (V,) in place."""
        if not self._seen:
            return
        seen = torch.tensor(sorted(self._seen), device=row.device)
        value, penalty = row[seen], self.sampling.repetition_penalty
        row[seen] = torch.where(value > 0, value / penalty, value * penalty)


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> tuple[list[int], list[float]]:
    """The next token and its raw log-prob for each row of logits (B, V) float32.

    Rows with equal settings are drawn together. A row with NaN gives a NaN log-prob.
    """
    adjusted = logits
    if any(s.sampling.repetition_penalty != 1 for s in samplers):
        adjusted = logits.clone()
        for row, sampler in zip(adjusted, samplers, strict=True):
            sampler.penalise(row)
    groups: dict[Sampling, list[int]] = {}
    for i, sampler in enumerate(samplers):
        groups.setdefault(sampler.sampling, []).append(i)
    chosen = torch.empty(len(samplers), dtype=torch.int64, device=logits.device)
    for sampling, rows in groups.items():
        part = adjusted if len(rows) == len(samplers) else adjusted[rows]
        if sampling.temperature == 0:
            chosen[rows] = part.argmax(-1)
        else:
            uniform = [samplers[i].uniform() for i in rows]
            chosen[rows] = draw(part, sampling, torch.tensor(uniform, dtype=torch.float64))
    picked = logits.gather(1, chosen[:, None]).squeeze(1) - logits.logsumexp(-1)
    ids, logprobs = chosen.tolist(), picked.tolist()
    for sampler, token in zip(samplers, ids, strict=True):
        sampler.see([token])
    return ids, logprobs


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """One token a row by inverting the cumulative distribution: logits (B, V), uniform (B,) -> (B,)."""
    shifted = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    ids = None  # of the columns, where they are no longer in vocabulary order
    if 0 < sampling.top_k < logits.shape[-1]:
        shifted, ids = shifted.topk(sampling.top_k)  # likeliest first
    elif sampling.top_p < 1:
        shifted, ids = shifted.sort(dim=-1, descending=True, stable=True)
    probs = shifted.double().softmax(-1)
    if sampling.top_p < 1:
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill(before > sampling.top_p, 0)
    if sampling.min_p > 0:
        probs = probs.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), 0)
    mass = probs.cumsum(-1)
    total = mass[:, -1:]
    place = torch.searchsorted(mass, uniform.to(mass.device)[:, None] * total, right=True)
    last = (mass < total).sum(-1, keepdim=True)  # rounding must not reach a token that was cut
    place = torch.minimum(place, last)
    return (place if ids is None else ids.gather(1, place)).squeeze(1)
