"""From logits to the next token: greedy, or drawn after temperature, top-k, top-p, min-p and typical.

    ids, logprobs = choose(logits, samplers)             # a row of logits and a Sampler a request
    top_of(logits, [5, 0])                               # alternatives, for the rows that want them
    probabilities(logits, sampling)                      # exactly what `draw` draws from

Each request draws from a generator of its own, one uniform number a token, and every row is computed
by itself, so what else is in the batch never changes a reply. Before the temperature a row goes
through repetition, frequency and presence penalty, logit bias, min_tokens and the grammar's mask, in
this order. Log-probs are those of the raw logits, before all of that (as in Meta's
`llama4/generation.py`). Beam search is in `beams`.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from herdling.errors import ConfigError
from herdling.infer.sampling import Sampling, bias_pairs

Mask = Callable[[Tensor], None]
"""Sets the logits (V,) that may not be chosen to -inf, in place."""

NUCLEUS = 512
"""Most top-p cuts end within this many tokens, which spares sorting the vocabulary."""
BLOCK = 2**22
"""Logits that `log_probs_of` holds in float32 at once: 16 MiB."""


def check_seed(seed: int | None) -> None:
    """Raise ConfigError for a seed that torch's generator does not take."""
    if seed is not None and not 0 <= seed < 2**63:
        raise ConfigError(f"seed is {seed}; it must be 0 to 2**63 - 1")


class Sampler:
    """One request's settings, generator, and tokens seen so far."""

    def __init__(
        self, sampling: Sampling, seed: int | None = 0, stop_ids: Sequence[int] = ()
    ) -> None:
        """`seed` None draws a fresh one; `stop_ids` are what `min_tokens` holds back."""
        check_seed(seed)
        self.sampling = sampling
        self.adjusts = sampling.adjusts
        # Rows of equal cuts are drawn together, whatever their penalties.
        cuts = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        self.cuts = (*cuts, sampling.typical_p) if sampling.temperature else None
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self._seen, self._said = _Tally(), _Tally()
        self._stops = torch.tensor(stop_ids, dtype=torch.int64)
        self._length = 0
        bias = bias_pairs(sampling.logit_bias)
        self._biased = torch.tensor([id for id, _ in bias], dtype=torch.int64)
        self._bias = torch.tensor([value for _, value in bias], dtype=torch.float32)

    def see(self, ids: Sequence[int]) -> None:
        """Tell the repetition penalty what stands in the prompt."""
        if self.sampling.repetition_penalty != 1:
            self._seen.add(ids)

    def take(self, token: int) -> None:
        """Count a token of the reply."""
        self._length += 1
        if self.adjusts:
            self.see([token])
            if self.sampling.frequency_penalty or self.sampling.presence_penalty:
                self._said.add([token])

    def uniform(self) -> float:
        """The next number of this request's own sequence, in [0, 1)."""
        return torch.rand((), dtype=torch.float64, generator=self._generator).item()

    def adjust(self, row: Tensor, ends_itself: bool = False) -> None:
        """Penalties, bias and min_tokens on logits (V,) float32, in place.

        `ends_itself`: a grammar decides where the reply ends, so min_tokens does not count.
        """
        settings, device = self.sampling, row.device
        if settings.repetition_penalty != 1:
            seen, penalty = self._seen.ids.to(device), settings.repetition_penalty
            value = row[seen]
            row[seen] = torch.where(value > 0, value / penalty, value * penalty)
        if len(self._said.ids):
            less = settings.frequency_penalty * self._said.counts + settings.presence_penalty
            row[self._said.ids.to(device)] -= less.to(device)
        if settings.logit_bias:
            row[self._biased.to(device)] += self._bias.to(device)
        if self._length < settings.min_tokens and not ends_itself:
            row[self._stops.to(device)] = -math.inf


class _Tally:
    """Different token ids, and how often each came; grows by what is new only."""

    def __init__(self) -> None:
        self.ids = torch.empty(0, dtype=torch.int64)
        self.counts = torch.empty(0)
        self._places: dict[int, int] = {}

    def add(self, tokens: Sequence[int]) -> None:
        fresh: dict[int, int] = {}
        for token, count in Counter(tokens).items():
            if (place := self._places.get(token)) is None:
                fresh[token] = count
                self._places[token] = len(self._places)
            else:
                self.counts[place] += count
        if fresh:
            self.ids = torch.cat([self.ids, torch.tensor(list(fresh))])
            self.counts = torch.cat([self.counts, torch.tensor(list(fresh.values())).float()])


def choose(
    logits: Tensor, samplers: Sequence[Sampler], masks: Sequence[Mask | None] | None = None
) -> tuple[list[int], list[float]]:
    """The next token and its raw log-prob for each row of logits (B, V) float32, left unchanged.

    `masks` has what a grammar forbids, for the rows that have one. Rows with equal cuts are drawn
    together. A row with NaN gives a NaN log-prob.
    """
    adjusted = _adjusted(logits, samplers, masks or [None] * len(samplers))
    groups: dict[tuple | None, list[int]] = {}
    for i, sampler in enumerate(samplers):
        groups.setdefault(sampler.cuts, []).append(i)
    chosen = torch.empty(len(samplers), dtype=torch.int64, device=logits.device)
    for cuts, rows in groups.items():
        part = adjusted if len(rows) == len(samplers) else adjusted[rows]
        if cuts is None:
            picked = part.argmax(-1)
        else:
            uniform = [samplers[i].uniform() for i in rows]
            sampling = samplers[rows[0]].sampling
            picked = draw(part, sampling, torch.tensor(uniform, dtype=torch.float64))
        if len(groups) == 1:
            chosen = picked
        else:
            chosen[rows] = picked
    # Not logsumexp: with several threads a sum over one long row adds in another order than over many.
    logprobs = logits.log_softmax(-1).gather(1, chosen[:, None]).squeeze(1)
    both = torch.stack([chosen.double(), logprobs.double()]).tolist()  # one transfer from a device
    ids = [int(token) for token in both[0]]
    for sampler, token in zip(samplers, ids, strict=True):
        sampler.take(token)
    return ids, both[1]


def _adjusted(logits: Tensor, samplers: Sequence[Sampler], masks: Sequence[Mask | None]) -> Tensor:
    """The logits after penalties, bias and masks; the same tensor where no row has any."""
    changed = [i for i, s in enumerate(samplers) if s.adjusts or masks[i] is not None]
    if not changed:
        return logits
    adjusted = logits.clone()
    for i in changed:
        mask = masks[i]
        if samplers[i].adjusts:
            samplers[i].adjust(adjusted[i], ends_itself=mask is not None)
        if mask is not None:
            mask(adjusted[i])
    return adjusted


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """One token a row by inverting the cumulative distribution: logits (B, V), uniform (B,) -> (B,)."""
    probs, ids = _kept(logits, sampling)
    mass = probs.cumsum(-1)
    total = mass[:, -1:]
    place = torch.searchsorted(mass, uniform.to(mass.device)[:, None] * total, right=True)
    last = (mass < total).sum(-1, keepdim=True)  # rounding must not reach a token that was cut
    place = torch.minimum(place, last)
    return (place if ids is None else ids.gather(1, place)).squeeze(1)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that `draw` draws from: adjusted logits (B, V) -> (B, V) float64.

    At temperature 0 all of it is on the likeliest token.
    """
    whole = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device)
    if sampling.temperature == 0:
        return whole.scatter_(1, logits.argmax(-1, keepdim=True), 1)
    probs, ids = _kept(logits, sampling)
    probs = probs / _sum(probs)
    return probs if ids is None else whole.scatter_(1, ids, probs)


def _kept(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Probabilities (B, K) float64 with zeros where cut, not normalised, and the ids of the columns
    (None: in the order of the vocabulary)."""
    shifted = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    ids = None
    if 0 < sampling.top_k < logits.shape[-1]:
        shifted, ids = shifted.topk(sampling.top_k)
    probs = shifted.double().softmax(-1)
    if sampling.top_p < 1:
        probs = _first(probs, -probs, sampling.top_p, closed=True)
    if sampling.min_p > 0:
        probs = probs.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), 0)
    if sampling.typical_p < 1:
        probs = probs / _sum(probs)
        surprise = -probs.log()
        entropy = _sum(torch.special.entr(probs))
        probs = _first(probs, (surprise - entropy).abs(), sampling.typical_p, closed=False)
    return probs, ids


def _sum(rows: Tensor) -> Tensor:
    """(B, K) -> (B, 1), in an order that does not depend on B, as `sum` does with several threads."""
    return rows.cumsum(-1)[:, -1:]


def _first(probs: Tensor, key: Tensor, mass: float, closed: bool) -> Tensor:
    """Probabilities (B, K) of the tokens with the smallest keys, zeros for the rest.

    A token stays while the mass before it is at most (`closed`) or below `mass`.
    """
    if probs.shape[-1] <= NUCLEUS or probs.is_cuda:
        return _before(probs, key.sort(dim=-1, stable=True).indices, mass, closed)
    order = key.topk(NUCLEUS, largest=False).indices
    out = _before(probs, order, mass, closed)
    # Each row decides for itself whether it needs the whole order, so neighbours change nothing.
    long = (_sum(probs.gather(1, order))[:, 0] <= mass).nonzero()[:, 0]
    if len(long):
        whole = key[long].sort(dim=-1, stable=True).indices
        out[long] = _before(probs[long], whole, mass, closed)
    return out


def _before(probs: Tensor, order: Tensor, mass: float, closed: bool) -> Tensor:
    part = probs.gather(1, order)
    before = part.cumsum(-1) - part
    keep = before <= mass if closed else before < mass
    return torch.zeros_like(probs).scatter_(1, order, part * keep)


def top_of(logits: Tensor, counts: Sequence[int]) -> list[list[tuple[int, float]]]:
    """The likeliest ids of raw logits (B, V) with their log-probs: as many as asked for each row."""
    found: list[list[tuple[int, float]]] = [[] for _ in counts]
    rows = [i for i, count in enumerate(counts) if count]
    if rows:
        part = logits if len(rows) == len(counts) else logits[rows]
        most = min(max(counts), logits.shape[-1])
        best, ids = part.log_softmax(-1).topk(most)
        for i, row, values in zip(rows, ids.tolist(), best.tolist(), strict=True):
            found[i] = list(zip(row, values, strict=True))[: counts[i]]
    return found


def log_probs_of(logits: Tensor, ids: Tensor, top: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of given tokens: logits (T, V) of any float type, ids (T,).

    Returns their log-probs (T,), and the `top` likeliest ids and log-probs, (T, top) each, on the
    CPU. Only BLOCK logits, at least a row, are in float32 at a time.
    """
    (length, V), top = logits.shape, min(top, logits.shape[-1])
    chosen = torch.empty(length)
    best_ids, best = torch.empty(length, top, dtype=torch.int64), torch.empty(length, top)
    rows = max(1, BLOCK // V)
    for a in range(0, length, rows):
        block, b = logits[a : a + rows].log_softmax(-1, dtype=torch.float32), a + rows
        chosen[a:b] = block.gather(1, ids[a:b, None].to(block.device))[:, 0]
        if top:
            best[a:b], best_ids[a:b] = block.topk(top)
    return chosen, best_ids, best
