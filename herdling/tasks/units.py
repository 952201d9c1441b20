"""Whole numbers of one unit in another, both ways; answer: the number.

Chance: one of the numbers, which the units narrow to as many as there are.
"""

import random

from herdling.data.drawing import one_of
from herdling.data.split import draw
from herdling.errors import ConfigError
from herdling.tasks.base import Item, ask, exact

UNITS = (
    ("kilometres", "metres", 1000), ("metres", "centimetres", 100), ("centimetres", "millimetres", 10),
    ("kilograms", "grams", 1000), ("tonnes", "kilograms", 1000), ("litres", "millilitres", 1000),
    ("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24), ("weeks", "days", 7),
    ("years", "months", 12), ("feet", "inches", 12), ("yards", "feet", 3), ("dozens", "pieces", 12),
)  # fmt: skip


class Units:
    name = "units"

    def __init__(self, seed: int = 0, most: int = 40) -> None:
        """1 to `most` of the larger unit."""
        if most < 2:
            raise ConfigError(f"most is {most}; it must be at least 2")
        self.seed, self.most = seed, most
        self.chance = 1 / most

    def item(self, index: int, split: str) -> Item:
        def make(rng: random.Random) -> tuple[str, int, str, str]:
            large, small, times = rng.choice(UNITS)
            count = rng.randint(1, self.most)
            given, one, other, answer = count, large, small, count * times
            if rng.random() < 0.5:
                given, one, other, answer = count * times, small, large, count
            said = one_of(rng, "How many {2} are {0} {1}?", "Convert {0} {1} to {2}.")
            return f"{count} {large} {small}", count, said.format(given, one, other), str(answer)

        made = draw(self.name, self.seed, split, index, make, lambda made: made[0])
        key, count, question, answer = made
        return Item(ask(question), answer, (count - 1) / (self.most - 1), key)

    def grade(self, item: Item, reply: str) -> float:
        return exact(item.answer, reply)
