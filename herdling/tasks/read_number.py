"""Read a number of one to three digits from a picture; answer: its digits.

Chance: the likeliest guess is one of the shortest numbers, so (share of that length) / (how many
numbers have it): with one to three digits 1/3 * 1/10 = 0.033.
"""

import random

from herdling.data.pages import Number, make_number, number_wording
from herdling.data.split import draw
from herdling.tasks.base import Item, ask, exact


class ReadNumber:
    name = "read_number"

    def __init__(self, seed: int = 0, side: int = 32, digits: tuple[int, int] = (1, 3)) -> None:
        self.seed, self.side, self.digits = seed, side, digits
        fewest, most = digits
        self.chance = 1 / (most - fewest + 1) / (10 if fewest == 1 else 9 * 10 ** (fewest - 1))

    def item(self, index: int, split: str) -> Item:
        def make(rng: random.Random) -> tuple[Number, str]:
            return make_number(rng, self.digits), number_wording(rng)

        number, question = draw(
            self.name, self.seed, split, index, make, lambda made: made[0].content
        )
        fewest, most = self.digits
        difficulty = (len(number.text) - fewest) / max(1, most - fewest)
        picture = number.page.draw(self.side)
        return Item(ask(question, picture), number.text, difficulty, number.content)

    def grade(self, item: Item, reply: str) -> float:
        return exact(item.answer, reply)
