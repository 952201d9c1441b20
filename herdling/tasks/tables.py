"""A question over a rendered page: what number stands beside a word; answer: the digit.

At 32 pixels two lines of a three-letter word and a digit are legible. Chance: one of the digits, which
are equally likely.
"""

import random

from herdling.data.pages import Table, beside_wording, make_table
from herdling.data.split import draw
from herdling.tasks.base import Item, ask, exact


class ReadTable:
    name = "read_table"
    chance = 1 / 9

    def __init__(self, seed: int = 0, side: int = 32, lines: int = 2, longest: int = 3) -> None:
        self.seed, self.side, self.lines, self.longest = seed, side, lines, longest

    def item(self, index: int, split: str) -> Item:
        def make(rng: random.Random) -> tuple[Table, int, str]:
            table = make_table(rng, self.lines, self.longest)
            line = rng.randrange(self.lines)
            return table, line, beside_wording(rng, table.entries[line][0])

        table, line, question = draw(
            self.name, self.seed, split, index, make, lambda made: made[0].content
        )
        answer = str(table.entries[line][1])
        difficulty = line / max(1, self.lines - 1)
        return Item(ask(question, table.page.draw(self.side)), answer, difficulty, table.content)

    def grade(self, item: Item, reply: str) -> float:
        return exact(item.answer, reply)
