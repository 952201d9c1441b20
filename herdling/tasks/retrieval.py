"""Find one line of a long document; answer: the number that it states.

    user       The code of lamp is 42. The code of tree is 17. The code of door is 85.
               What is the code of tree?
    assistant  17

All lines are alike, so that only the asked word tells them apart. `lines` makes it as long as is
wanted: a thousand lines are some ten thousand tokens. Chance: one of the numbers that stand there.
"""

import random

from herdling.data.drawing import one_of
from herdling.data.pages import words
from herdling.data.split import draw
from herdling.errors import ConfigError
from herdling.tasks.base import Item, ask, exact

_LONGEST = 8
_LOWEST, _HIGHEST = 10, 99


class Retrieval:
    name = "retrieval"

    def __init__(self, seed: int = 0, lines: int = 10, fewest: int = 3) -> None:
        """Documents of `fewest` to `lines` lines."""
        if not 2 <= fewest <= lines <= 1000:
            raise ConfigError(
                f"fewest is {fewest} and lines {lines}; need 2 <= fewest <= lines <= 1000"
            )
        self.seed, self.lines, self.fewest = seed, lines, fewest
        # Beyond 90 lines numbers stand there more than once, and any of them is as good.
        counts = range(fewest, lines + 1)
        self.chance = sum(max(1 / n, 1 / 90) for n in counts) / len(counts)

    def item(self, index: int, split: str) -> Item:
        def make(rng: random.Random) -> tuple[list[tuple[str, int]], int]:
            count = rng.randint(self.fewest, self.lines)
            names = rng.sample(words("train", _LONGEST), count)
            numbers = rng.sample(range(_LOWEST, _HIGHEST + 1), min(count, 90))
            while len(numbers) < count:
                numbers.append(rng.randint(_LOWEST, _HIGHEST))
            return list(zip(names, numbers, strict=True)), rng.randrange(count)

        def content(made: tuple[list[tuple[str, int]], int]) -> str:
            lines, asked = made
            return f"code {lines[asked][0]} {lines[asked][1]}"

        made = draw(self.name, self.seed, split, index, make, content)
        lines, asked = made
        pick = random.Random(f"{self.name}/{self.seed}/{split}/{index}/wording")
        question = one_of(pick, "What is the code of {}?", "Which code has {}?").format(
            lines[asked][0]
        )
        document = " ".join(f"The code of {name} is {number}." for name, number in lines)
        difficulty = (len(lines) - self.fewest) / max(1, self.lines - self.fewest)
        answer = str(lines[asked][1])
        return Item(ask(f"{document}\n{question}"), answer, difficulty, content(made))

    def grade(self, item: Item, reply: str) -> float:
        return exact(item.answer, reply)
