"""The date some days later, the days between two dates, the weekday; answer: as 2024-03-06, 10, Friday.

A date is in one split for all three. Chance: nothing to guess for the first; one of the numbers of days;
one of the weekdays.
"""

import random
from datetime import date, timedelta

from herdling.data.drawing import one_of
from herdling.data.split import draw
from herdling.errors import ConfigError
from herdling.tasks.base import Item, ask, exact

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_FIRST, _SPAN = date(2000, 1, 1), 36_500


class Dates:
    name = "dates"

    def __init__(self, seed: int = 0, most: int = 40) -> None:
        """Spans of 1 to `most` days, from a date of this century."""
        if most < 1:
            raise ConfigError(f"most is {most}; it must be at least 1")
        self.seed, self.most = seed, most
        self.chance = (0 + 1 / most + 1 / 7) / 3

    def item(self, index: int, split: str) -> Item:
        def make(rng: random.Random) -> tuple[date, int, str, str]:
            day = _FIRST + timedelta(days=rng.randrange(_SPAN))
            span = rng.randint(1, self.most)
            later = day + timedelta(days=span)
            kind = rng.choice(("later", "between", "weekday"))
            if kind == "later":
                said = one_of(rng, "Which date is {} days after {}?", "What is {} days after {}?")
                return day, span, said.format(span, day), later.isoformat()
            if kind == "between":
                said = one_of(rng, "How many days from {} to {}?", "Count the days from {} to {}.")
                return day, span, said.format(day, later), str(span)
            said = one_of(rng, "Which weekday is {}?", "What day of the week is {}?")
            return day, self.most, said.format(day), _DAYS[day.weekday()]

        made = draw(self.name, self.seed, split, index, make, lambda made: f"date {made[0]}")
        day, span, question, answer = made
        return Item(ask(question), answer, span / self.most, f"date {day}")

    def grade(self, item: Item, reply: str) -> float:
        return exact(item.answer, reply)
