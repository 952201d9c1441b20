"""Sums, differences and products of whole numbers; answer: the number in digits.

A pair of numbers is in one split whichever stands first. Chance: the likeliest answer of each
operation, whose sign the question shows, over all pairs; about 0.05 with the default range.
"""

import random
from collections import Counter
from collections.abc import Callable

from herdling.data.drawing import one_of
from herdling.data.split import check_place, draw
from herdling.errors import ConfigError
from herdling.tasks.base import Item, ask, exact

_APPLY: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}


def key(sign: str, a: int, b: int) -> str:
    """What decides the split of a sum: the same whichever number stands first."""
    return f"{min(a, b)}{sign}{max(a, b)}"


class Arithmetic:
    name = "arithmetic"

    def __init__(
        self, seed: int = 0, most: int = 20, most_factor: int = 10, operations: str = "+-*"
    ) -> None:
        """Terms from 0 to `most`, the smaller one subtracted; factors from 1 to `most_factor`."""
        if not operations or set(operations) - _APPLY.keys():
            raise ConfigError(f"operations is {operations!r}; use some of + - *")
        if most < 1 or most_factor < 1:
            raise ConfigError(f"most {most} and most_factor {most_factor} must be at least 1")
        self.seed, self.most, self.most_factor = seed, most, most_factor
        self.operations = operations
        self.chance = sum(self._best_guess(sign) for sign in operations) / len(operations)

    def item(self, index: int, split: str) -> Item:
        check_place(split, index)
        # The operation first and apart: a split's share of its pairs must not change its odds.
        pick = random.Random(f"{self.name}/{self.seed}/{split}/{index}/operation")
        sign = pick.choice(self.operations)
        numbers = self._numbers(sign)

        def make(rng: random.Random) -> tuple[int, int, str]:
            a, b = rng.choice(numbers), rng.choice(numbers)
            if sign == "-":
                a, b = max(a, b), min(a, b)
            wording = one_of(rng, "What is {}?", "Calculate {}.", "How much is {}?", "{} =")
            return a, b, wording.format(f"{a} {sign} {b}")

        def content(made: tuple[int, int, str]) -> str:
            return key(sign, *made[:2])

        made = draw(f"{self.name}/{sign}", self.seed, split, index, make, content)
        a, b, question = made
        difficulty = max(a, b) / numbers[-1]
        return Item(ask(question), str(_APPLY[sign](a, b)), difficulty, content(made))

    def grade(self, item: Item, reply: str) -> float:
        return exact(item.answer, reply)

    def _numbers(self, sign: str) -> range:
        return range(1, self.most_factor + 1) if sign == "*" else range(self.most + 1)

    def _best_guess(self, sign: str) -> float:
        """The share of the commonest answer, worked out on at most 500 numbers."""
        numbers = self._numbers(sign)[:500]
        answers = Counter(abs(_APPLY[sign](a, b)) for a in numbers for b in numbers)
        return max(answers.values()) / len(numbers) ** 2
