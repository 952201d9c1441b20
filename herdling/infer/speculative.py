"""Speculative decoding's rule, and how many tokens are worth drafting.

    tokens = accept(logits, draft.tokens, draft.q, sampler)      # of one verification

The target reads g drafted tokens in one pass and `accept` keeps those that leave its distribution as
it was (Leviathan et al. 2022, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318). What it returns is
distributed as g calls of `sampler.choose` would be, whatever drafted: penalties, bias, cuts and masks
are applied position by position, each after the tokens accepted before it. Where the draft is certain
of itself (q None: n-grams, any draft at temperature 0) the tokens are the very ones that `choose` gives
for the same seed. Left out: trees of several drafts.

Shape letters: g drafted tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from herdling.infer.costs import Costs
from herdling.infer.sampler import Mask, Sampler, choose, probabilities

MEMORY = 24
"""Tested tokens that the estimate of a request's acceptance rate looks back on."""
LONGEST_PAUSE = 64
"""Most tokens between two probes while drafting does not pay."""


def accept(
    logits: Tensor,
    draft: Sequence[int],
    q: Tensor | None,
    sampler: Sampler,
    masks: Sequence[Mask | None] | None = None,
    likeliest: list[int] | None = None,
) -> list[int]:
    """The tokens that one verification yields, 1 to g + 1: agreed ones, then one of the target's own.

    Args:
        logits: (g + 1, V) float32, raw: of each drafted token, and of the one behind them.
        q: (g, V) float64, the distributions that the drafted tokens were drawn from; None if the
            draft drew nothing.
        masks: g + 1 masks of a grammar, each for the state after the drafted tokens before it.
        likeliest: `logits.argmax(-1)`, where it is known.

    `sampler` takes every returned token. Raises ValueError when the lengths do not fit.
    """
    rows = len(draft) + 1
    masks = [None] * rows if masks is None else masks
    if not rows == len(logits) == len(masks) or (q is not None and len(q) != len(draft)):
        raise ValueError(f"{len(draft)} drafted tokens with logits of shape {tuple(logits.shape)}")
    if q is not None and sampler.sampling.temperature > 0:
        return _tested(logits, draft, q, sampler, masks)
    if sampler.sampling.temperature == 0 and not sampler.adjusts and not any(masks):
        if likeliest is None:
            likeliest = logits.argmax(-1).tolist()  # all positions with one transfer from a device
        tokens = likeliest[: _agreed(likeliest, draft) + 1]
        for token in tokens:
            sampler.take(token)
        return tokens
    tokens = []
    for i, mask in enumerate(masks):
        tokens += choose(logits[i : i + 1], [sampler], [mask])[0]
        if i < len(draft) and tokens[i] != draft[i]:
            break
    return tokens


def _agreed(tokens: Sequence[int], draft: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(tokens, draft, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(draft)))


def _tested(
    logits: Tensor,
    draft: Sequence[int],
    q: Tensor,
    sampler: Sampler,
    masks: Sequence[Mask | None],
) -> list[int]:
    """Keep a drafted token x with probability min(1, p(x) / q(x)), else draw from the residual."""
    for i, token in enumerate(draft):
        p, guess = _target(logits[i], sampler, masks[i]), q[i].to(logits.device)
        if sampler.uniform() * guess[token] >= p[token]:
            last = draw_from(residual(p, guess), sampler)
            sampler.take(last)
            return [*draft[:i], last]
        sampler.take(token)
    last = draw_from(_target(logits[-1], sampler, masks[-1]), sampler)
    sampler.take(last)
    return [*draft, last]


def _target(row: Tensor, sampler: Sampler, mask: Mask | None) -> Tensor:
    """What the target draws from at this position: logits (V,) -> (V,) float64."""
    if sampler.adjusts or mask is not None:
        row = row.clone()
        sampler.adjust(row, ends_itself=mask is not None)
        if mask is not None:
            mask(row)
    return probabilities(row[None], sampler.sampling)[0]


def residual(p: Tensor, q: Tensor) -> Tensor:
    """Where a rejected draft's token is drawn from: max(0, p - q), not normalised.

    It is empty only where p and q are equal up to rounding; then it is p.
    """
    rest = (p - q).clamp(min=0)
    return rest if bool(rest.any()) else p


def draw_from(weights: Tensor, sampler: Sampler) -> int:
    """One token by weights (V,) float64, with the request's next number."""
    mass = weights.cumsum(-1)
    place = torch.searchsorted(mass, sampler.uniform() * mass[-1], right=True)
    return int(torch.minimum(place, (mass < mass[-1]).sum()))  # never a token of no weight


class DraftLength:
    """How many tokens to draft for one request: `choose` before a step, `record` after it.

    The length is the one that the request's own acceptance so far makes fastest by the costs given.
    Where no length pays, none is drafted but for a probe of one token now and then, at growing
    distances; so text that cannot be guessed costs little. It follows from the request alone, not
    from the clock or from its neighbours: seeds reproduce.
    """

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        # Begin as if one token in two had been accepted, and forget that soon.
        self._hits, self._tests = 1.0, 2.0
        self._pause = self._waited = 0
        self.drafted = self.accepted = 0
        """Totals."""

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that pass, each tested after the ones before it passed."""
        return self._hits / self._tests

    def choose(self) -> int:
        """Tokens to draft now, 0 to `costs.longest`."""
        best = self._costs.best(self.acceptance)
        if best or not self._costs.longest:
            return best
        return int(self.probe())

    def probe(self, worth: bool = True) -> bool:
        """Whether to try one token where none is thought to pay; not while it could not pay if right."""
        self._waited += 1
        return worth and self._waited > self._pause

    def record(self, drafted: int, accepted: int) -> None:
        """Tell what came of `drafted` tokens; nothing changes where none were."""
        if not drafted:
            return
        self.drafted += drafted
        self.accepted += accepted
        tests = min(accepted + 1, drafted)
        keep = (1 - 1 / MEMORY) ** tests
        self._hits = self._hits * keep + accepted
        self._tests = self._tests * keep + tests
        if not self._costs.best(self.acceptance):
            self._waited = 0
            self._pause = 0 if accepted else min(max(4, 2 * self._pause), LONGEST_PAUSE)
        else:
            self._pause = 0
