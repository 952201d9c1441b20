"""One thread for torch or all of them, whichever is faster just now.

A step of a small model is hundreds of short operations, and with several threads each ends at a barrier.
Where other programs want the cores too, the barrier waits for a thread that is not running, and steps
take many times as long (docs/serving.md). On an idle machine all threads are faster. Nothing says
beforehand which it is, so both are timed, and what trying costs is kept to a small share of all time.

Results may differ in the last bits with the number of threads, so this is for serving; rollouts that must
repeat exactly keep one number.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from herdling.kernels.cpu.threads import alone

PRICE = 50
"""A trial that lost so many seconds is paid for by this many times as much work before the next."""
LEAST_STEPS = 16
"""Steps of a size between two trials at least."""
KEPT = 0.8
"""What a new time leaves of the average before it."""


@dataclass
class Size:
    """What is known of steps of about one size."""

    seconds: dict[bool, float] = field(default_factory=dict)
    """Per token, with one thread (True) and with all."""
    steps: int = 0
    """Since the last trial."""
    worked: float = 0.0
    """Seconds since the last trial."""
    price: float = 0.0
    """Seconds of work that pay for the next trial."""

    def best(self) -> bool:
        return self.seconds.get(True, 0.0) <= self.seconds.get(False, float("inf"))

    def choose(self) -> bool:
        """Whether to use one thread in the next step: what was faster, or the other as a trial."""
        due = self.steps >= LEAST_STEPS and self.worked >= self.price
        return self.best() != due

    def note(self, one: bool, seconds: float, tokens: int) -> float:
        """Take in a step's time; returns how much longer than usual it took if it was a trial, else 1."""
        usual, before, own = self.best(), self.seconds.get(one), seconds / tokens
        if one == usual:
            self.seconds[one] = own if before is None else KEPT * before + (1 - KEPT) * own
            self.steps, self.worked = self.steps + 1, self.worked + seconds
            return 1.0
        expected = self.seconds[usual] * tokens
        self.price = PRICE * max(0.0, seconds - expected)
        self.steps, self.worked, self.seconds[one] = 0, 0.0, own
        return seconds / expected


class Pace:
    """Chooses torch's threads for each step: `with pace(tokens): ...`, in the engine's thread."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.sizes: dict[int, Size] = {}
        """By the tokens of a step, in powers of two."""

    @contextmanager
    def __call__(self, tokens: int) -> Iterator[bool]:
        """Yields whether the step runs in one thread."""
        if torch.get_num_threads() == 1 or tokens < 1:
            yield True
            return
        size = self.sizes.setdefault(tokens.bit_length(), Size())
        one, begun = size.choose(), self._clock()
        with alone() if one else nullcontext():
            yield one
        slower = size.note(one, self._clock() - begun, tokens)
        if slower > 1:  # likely so for every size: the others' first trials wait as long
            for other in self.sizes.values():
                if False not in other.seconds:
                    typical = other.worked / max(1, other.steps)
                    other.price = PRICE * (slower - 1) * typical
