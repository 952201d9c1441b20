"""How many tokens each sequence of a step guesses, by what steps of so many tokens took lately.

    guessing = Guessing(costs)                                  # one for an engine
    counts = guessing.choose([(length, 8), ...])                # where all sequences decode
    guessing.note(tokens, guessed, seconds)                     # of the step, without the drafter's time
    guessing.guesses.note(sum(counts) - 1, seconds)             # of the drafter

What bytes predict is only where it begins: how a step's time grows with its tokens depends on kernels,
caches, threads and neighbours, and with several sequences a step leaves fast paths that one never leaves.
So all are timed: steps without
guesses, steps with, drafters. Guesses that are certain (n-grams, likeliest tokens) change nothing but speed, whatever
is chosen here; drafts that draw would give other tokens for the same seed, and have their lengths from
`DraftLength.choose` instead.
"""

import math
from collections.abc import Sequence

from herdling.infer.costs import Costs
from herdling.infer.speculative import DraftLength

EXACT = 16
"""Numbers of tokens that have a place of their own; above, places are an eighth of a doubling apart."""
MOST = 1024
"""Longer steps are taken to be like this one."""
KEPT = 24.0
"""Steps that an average looks back on."""
REACH = 0.35
"""What a time says about places at a distance of a factor e: so many times exp(-that over this)."""
FAR = 0.01
"""What it says about all others, as long as they have nothing nearer to go by."""
JUMP = 0.5
"""Most that one time, which something else on the machine may have stretched, is off the average (log)."""
SAMPLED = 4
"""Where an average is settled, one time in so many is taken in."""


class Times:
    """Seconds by a number of tokens: a prediction's shape, corrected by what was measured.

    Corrections are averages of log(measured / predicted); a time also counts for its neighbours, the
    less the farther they are and the more they have of their own.
    """

    def __init__(self, predicted: Sequence[float]) -> None:
        """`predicted[n]`, n = 0, 1, ..: in any unit; longer ones go on as the last two do."""
        self.predicted = list(predicted[: MOST + 1])
        slope = max(0.0, self.predicted[-1] - self.predicted[-2])
        while len(self.predicted) <= MOST:
            self.predicted.append(self.predicted[-1] + slope)
        self.place = [_place(n) for n in range(MOST + 1)]
        count = self.place[-1] + 1
        logs = [math.log1p(_middle(self.place, i)) for i in range(count)]
        near = [[math.exp(-abs(a - b) / REACH) for b in logs] for a in logs]
        self._near = [[(i, s) for i, s in enumerate(row) if s > FAR] for row in near]
        self._correction, self._weight = [0.0] * count, [0.0] * count
        self.factors = [1.0] * count
        """Seconds over `predicted` by place."""
        self._noted = 0

    @property
    def measured(self) -> bool:
        return self._noted > 0

    def note(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        tokens = min(tokens, MOST)
        place, first = self.place[tokens], not self._noted
        self._noted += 1
        if self._weight[place] > KEPT - 1 and self._noted % SAMPLED:
            return
        found = math.log(max(seconds, 1e-9) / self.predicted[tokens])
        if first:
            count = len(self.factors)
            self._correction, self._weight = [found] * count, [FAR] * count
            self.factors = [math.exp(found)] * count
        for i, share in self._near[place]:
            off = found - self._correction[i]
            if self._weight[i] >= 1:
                off = max(-JUMP, min(off, JUMP))
            self._correction[i] += share / (self._weight[i] + share) * off
            self._weight[i] = min(self._weight[i] + share, KEPT)
            self.factors[i] = math.exp(self._correction[i])

    def forget(self, kept: float) -> None:
        """Let what was measured count for less from now on."""
        self._weight = [kept * weight for weight in self._weight]

    def factor(self, tokens: int) -> float:
        """Seconds over `predicted`."""
        return self.factors[self.place[min(tokens, MOST)]]

    def at(self, tokens: int) -> float:
        """Expected seconds of a step of so many tokens."""
        tokens = min(tokens, MOST)
        return self.predicted[tokens] * self.factors[self.place[tokens]]


def _place(tokens: int) -> int:
    return tokens if tokens <= EXACT else EXACT + 1 + int(8 * math.log2(tokens / (EXACT + 1)))


def _middle(places: Sequence[int], place: int) -> float:
    first = places.index(place) if place in places else 0
    return first + (places.count(place) - 1) / 2


REST = 8
"""Steps to the next choice after one that chose nothing, with that many sequences or more: choosing for
many takes time too."""
PLAIN = 48
"""Steps with guesses after which there is one without."""
RETRY = 256
"""Steps without a guess after which one is made whatever is thought of it: times change."""


class Guessing:
    """Chooses for all sequences of a step together."""

    def __init__(self, costs: Costs) -> None:
        """`costs` predict checks of as many tokens as there are costs for; longer ones go on alike."""
        predicted = [costs.verify[0], *costs.verify]
        self.plain, self.checks = Times(predicted), Times(predicted)
        """Of whole steps but for the guessing: in which nobody guessed, and others."""
        self.guesses = Times([max(costs.draft, 1e-3) * n for n in range(1, MOST + 2)])
        """Of a drafter's calls, by the tokens that all were asked for, less one."""
        self._without = self._with = self._rest = 0

    def note(self, tokens: int, guessed: int, seconds: float) -> None:
        """A step with so many tokens, guesses among them, took so long but for the guessing."""
        (self.checks if guessed else self.plain).note(tokens, seconds)

    def resting(self) -> bool:
        """Whether this step has no guesses, without a choice: asked once a step, before `choose`."""
        if self._rest:
            self._rest -= 1
            self._without += 1
        return self._rest > 0

    def choose(self, lengths: Sequence[tuple[DraftLength, int]]) -> list[int]:
        """Tokens to guess for each sequence: those that make most tokens a second expected.

        Each sequence has its acceptance and the most that it may guess. Where none pays, a sequence that
        would gain from being right has a probe of one token now and then.
        """
        counts = [0] * len(lengths)
        if not self.plain.measured:
            return counts
        gains: list[tuple[float, int]] = []  # of each guess more
        for i, (length, most) in enumerate(lengths):
            gain = acceptance = min(length.acceptance, 1.0)
            for _ in range(most):
                gains.append((gain, i))
                gain *= acceptance
        if not gains:
            return counts
        gains.sort(key=_gain, reverse=True)
        tokens, made = len(lengths), float(len(lengths))
        if self._with >= PLAIN:  # what a step without guesses takes must stay known
            self._with = 0
            self.plain.forget(0.8)
            return counts
        # What was not timed yet is predicted from steps that were.
        scale = self.plain.factor(tokens)
        check = 1.0 if self.checks.measured else scale
        guess = 1.0 if self.guesses.measured else scale
        plain = best = made / self.plain.at(tokens)
        first = plain + 1
        count = 0
        for n, (gain, _) in enumerate(gains):
            made += gain
            seconds = check * self.checks.at(tokens + n + 1) + guess * self.guesses.at(n)
            if not n:
                first = (len(lengths) + 1) / seconds
            if made / seconds > best:
                best, count = made / seconds, n + 1
        for _, i in gains[:count]:
            counts[i] += 1
        self._with += count > 0
        self._without = 0 if count else self._without + 1
        if self._without >= RETRY:  # twice: the first time a draft has much to read
            if self._without > RETRY:
                self._without = 0
                self.checks.forget(0.5)
                self.guesses.forget(0.5)
            counts[gains[0][1]] = 1
        elif not count:  # were its guess right, would it pay?
            for i, (length, most) in enumerate(lengths):
                counts[i] = int(most > 0 and length.probe(first > plain))
            self._rest = 0 if any(counts) else min(REST, len(lengths))
        return counts


def _gain(entry: tuple[float, int]) -> float:
    return entry[0]
