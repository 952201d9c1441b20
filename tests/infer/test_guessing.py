"""Run: python -m pytest tests/infer/test_guessing.py. A simulated machine says how long steps take."""

from collections.abc import Callable

import pytest
import torch

from herdling.infer.costs import Costs
from herdling.infer.guessing import KEPT, RETRY, Guessing, Times
from herdling.infer.speculative import DraftLength

COSTS = Costs(0.1, tuple(1 + 0.05 * g for g in range(128)))
"""What is predicted; the machines below are others."""


class Machine:
    """Sequences with a true acceptance each, decoded together by what `guessing` chooses."""

    def __init__(
        self,
        acceptance: list[float],
        step: Callable[[int, int], float],
        guess: Callable[[int], float],
    ) -> None:
        """`step(tokens, guessed)` and `guess(asked)` are seconds."""
        self.acceptance, self.step, self.guess = acceptance, step, guess
        self.guessing = Guessing(COSTS)
        self.lengths = [DraftLength(COSTS) for _ in acceptance]
        self.generator = torch.Generator().manual_seed(0)
        self.seconds = self.tokens = 0.0
        self.counts: list[list[int]] = []

    def run(self, steps: int) -> float:
        """Tokens a second of these steps."""
        before = self.tokens, self.seconds
        for _ in range(steps):
            counts = [0] * len(self.lengths)
            if not self.guessing.resting():
                counts = self.guessing.choose([(length, 8) for length in self.lengths])
            asked = sum(counts)
            if asked:
                self.guessing.guesses.note(asked - 1, self.guess(asked))
                self.seconds += self.guess(asked)
            for length, rate, count in zip(self.lengths, self.acceptance, counts, strict=True):
                draws = torch.rand(count, generator=self.generator) < rate
                right = int(draws.cumprod(0).sum())
                length.record(count, right)
                self.tokens += right + 1
            took = self.step(len(counts) + asked, asked)
            self.guessing.note(len(counts) + asked, asked, took)
            self.seconds += took
            self.counts.append(counts)
        return (self.tokens - before[0]) / (self.seconds - before[1])


def plain(machine: Machine) -> float:
    """What it does without guesses."""
    n = len(machine.lengths)
    return n / machine.step(n, 0)


def test_lengths_are_those_of_the_machine_and_not_of_the_prediction():
    flat = Machine([0.8], lambda tokens, _: 1e-3 * (1 + 0.01 * tokens), lambda asked: 2e-5 * asked)
    flat.run(300)
    best = max((sum(0.8**k for k in range(g + 1)) / (1e-3 * (1.01 + 0.01 * g) + 2e-5 * g))
               for g in range(9))  # fmt: skip
    assert flat.run(2000) > 0.93 * best
    steep = Machine([0.8], lambda tokens, _: 1e-3 * tokens, lambda asked: 1e-4 * asked)
    steep.run(300)
    assert steep.run(2000) > 0.97 * plain(steep)  # each guess costs more than it brings


@pytest.mark.parametrize("sequences", [1, 8, 32])
def test_guesses_that_do_not_pay_cost_little_however_many_run(sequences):
    # Steps with guesses leave a fast path: four times as long at once, which nothing predicted.
    cliff = Machine(
        [0.85] * sequences,
        lambda tokens, guessed: (4 if guessed else 1) * (1e-3 + 1e-4 * tokens),
        lambda asked: 5e-5 * asked,
    )
    first = cliff.run(400)
    assert first > 0.9 * plain(cliff)
    assert cliff.run(3000) > 0.97 * plain(cliff)


def test_those_who_are_right_guess_most():
    mixed = Machine([0.95] * 2 + [0.2] * 6, lambda tokens, _: 1e-3 + 1e-4 * tokens, lambda _: 1e-5)
    mixed.run(400)
    rate = mixed.run(1000)
    late = torch.tensor(mixed.counts[-1000:]).float().mean(0)
    assert late[:2].min() > 3 * late[2:].max()
    assert rate > 1.3 * plain(mixed)


def test_what_a_step_without_guesses_takes_stays_known():
    # At first guesses pay; then steps without them become fast, which only such steps can show.
    machine = Machine([0.7], lambda *_: 1e-3, lambda _: 1e-4)
    machine.run(500)
    assert sum(map(sum, machine.counts[-300:])) > 500
    machine.step = lambda tokens, guessed: 1e-3 if guessed else 1e-4
    machine.run(3000)
    assert machine.run(1000) > 0.9 * plain(machine)


def test_it_tries_again_when_guesses_may_have_become_cheap():
    machine = Machine([0.9], lambda *_: 1e-3, lambda _: 1e-2)  # a slow drafter
    machine.run(400)
    assert sum(map(sum, machine.counts[-100:])) <= 2
    machine.guess = lambda _: 1e-5
    machine.run(30 * RETRY)
    assert machine.run(1000) > 2 * plain(machine)


def test_limits_are_kept_and_nobody_is_nothing():
    guessing = Guessing(Costs(0.0, (1.0,) * 128))
    assert guessing.choose([(DraftLength(COSTS), 5)]) == [0]  # no step was timed yet
    guessing.note(1, 0, 1e-3)
    lengths = [DraftLength(COSTS) for _ in range(3)]
    for length in lengths:
        length.record(20, 20)
    assert guessing.choose([(lengths[0], 5), (lengths[1], 0), (lengths[2], 2)]) == [5, 0, 2]
    assert guessing.choose([]) == []
    assert guessing.choose([(lengths[0], -1), (lengths[1], 0)]) == [0, 0]


def test_one_slow_step_says_little():
    times = Times([1.0, 1.0, 1.1, 1.2, 1.3])
    for _ in range(int(KEPT)):
        times.note(3, 2.4e-3)
    assert times.at(3) == pytest.approx(2.4e-3)
    times.note(3, 1.0)
    assert times.at(3) < 2.5e-3


def test_neighbours_speak_for_lengths_that_were_not_measured():
    times = Times([1.0, 1.0, 1.1, 1.2, 1.3, 1.4])
    assert not times.measured
    times.note(1, 5e-3)
    assert times.at(4) == pytest.approx(1.3 * 5e-3)  # the prediction's shape
    for _ in range(40):
        times.note(1, 5e-3)
        times.note(4, 20e-3)
    assert times.at(1) == pytest.approx(5e-3, rel=0.2)
    assert times.at(4) == pytest.approx(20e-3, rel=0.1)
    assert times.at(5) > 15e-3
    assert times.at(5000) > 0  # however long
