"""A sum of several steps, worked out line by line; answer: a line a step, the last one ends with the result.

    user       Take 7. Add 5. Multiply by 3. What do you get?
    assistant  7 + 5 = 12
               12 * 3 = 36

Only the last line is graded, so the working may be any, or left out. Working that is trained states no
sum that `arithmetic` holds out. Chance: the commonest result.
"""

import functools
import random

from herdling.data.drawing import one_of
from herdling.data.split import draw, split_of
from herdling.errors import ConfigError
from herdling.tasks.arithmetic import key
from herdling.tasks.base import Item, ask
from herdling.tasks.graders import number

_SAID = {"+": "Add {}.", "-": "Subtract {}.", "*": "Multiply by {}."}


class Steps:
    name = "arithmetic_steps"
    chance = 0.03  # measured for the defaults

    def __init__(self, seed: int = 0, steps: int = 3, most: int = 99) -> None:
        """2 to `steps` steps that never leave 0..`most`."""
        if steps < 2 or most < 10:
            raise ConfigError(f"steps is {steps} and most {most}; need at least 2 and 10")
        self.seed, self.steps, self.most = seed, steps, most

    def item(self, index: int, split: str) -> Item:
        def content(made: tuple[str, list[str]]) -> str:
            return "; ".join(made[1])

        def make(rng: random.Random) -> tuple[str, list[str]]:
            return self._make(rng, trained=split == "train")

        made = draw(self.name, self.seed, split, index, make, content)
        difficulty = (len(made[1]) - 2) / max(1, self.steps - 2)
        return Item(ask(made[0]), "\n".join(made[1]), difficulty, content(made))

    def grade(self, item: Item, reply: str) -> float:
        return number({"answer": item.answer.rpartition("= ")[2]}, reply)

    def _make(self, rng: random.Random, trained: bool) -> tuple[str, list[str]]:
        """The question, and the working."""
        value = rng.randint(1, min(20, self.most))
        said = [one_of(rng, "Take {}.", "Start with {}.").format(value)]
        working: list[str] = []
        for _ in range(rng.randint(2, self.steps)):
            sign, other, after = rng.choice(_possible(value, self.most, trained))
            said.append(_SAID[sign].format(other))
            working.append(f"{value} {sign} {other} = {after}")
            value = after
        return " ".join([*said, one_of(rng, "What do you get?", "What is the result?")]), working


@functools.lru_cache(maxsize=1024)
def _possible(value: int, most: int, trained: bool) -> list[tuple[str, int, int]]:
    """(sign, number, result) of the steps that stay within bounds."""
    steps = [("+", n, value + n) for n in range(1, 11)]
    steps += [("-", n, value - n) for n in range(1, 11)]
    steps += [("*", n, value * n) for n in range(2, 6) for _ in range(2)]
    return [
        (sign, n, after)
        for sign, n, after in steps
        if 0 <= after <= most and not (trained and split_of(key(sign, value, n)) != "train")
    ]
