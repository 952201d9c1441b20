"""Put a few numbers in ascending order; answer: the numbers, spaces between them.

A set of numbers is in one split in whatever order it is asked. Chance: repeating the numbers as they
stand is right once in n! times, so the mean of 1/n! over the lengths.
"""

import math
import random

from herdling.data.drawing import one_of
from herdling.data.split import draw
from herdling.errors import ConfigError
from herdling.tasks.base import Item, ask, exact


class Sorting:
    name = "sorting"

    def __init__(self, seed: int = 0, longest: int = 4, most: int = 99) -> None:
        """2 to `longest` different numbers from 0 to `most`."""
        if longest < 2 or most < longest:
            raise ConfigError(f"longest is {longest} and most {most}; need 2 <= longest <= most")
        self.seed, self.longest, self.most = seed, longest, most
        lengths = range(2, longest + 1)
        self.chance = sum(1 / math.factorial(n) for n in lengths) / len(lengths)

    def item(self, index: int, split: str) -> Item:
        def make(rng: random.Random) -> tuple[list[int], str]:
            numbers = rng.sample(range(self.most + 1), rng.randint(2, self.longest))
            wording = one_of(rng, "Sort {}.", "Put {} in ascending order.", "Order these: {}")
            return sorted(numbers), wording.format(" ".join(map(str, numbers)))

        def content(made: tuple[list[int], str]) -> str:
            return " ".join(map(str, made[0]))

        made = draw(self.name, self.seed, split, index, make, content)
        difficulty = (len(made[0]) - 2) / max(1, self.longest - 2)
        return Item(ask(made[1]), content(made), difficulty, content(made))

    def grade(self, item: Item, reply: str) -> float:
        return exact(item.answer, reply)
