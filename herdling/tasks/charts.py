"""Two tasks on bar charts: the colour of the tallest bar, and the value of a named bar."""

import random

from herdling.data.charts import (
    FEWEST,
    MOST,
    TOP,
    Chart,
    largest_wording,
    make_chart,
    value_wording,
)
from herdling.data.split import draw
from herdling.tasks.base import Item, ask, exact


class LargestBar:
    """Which bar is the tallest? Two to five bars, answered by colour."""

    name = "largest_bar"
    # Naming any bar that is there, blind to the heights, is right once in 2, 3, 4 or 5 times: the
    # mean of these. Ignoring the picture altogether gives 1/6.
    chance = sum(1 / bars for bars in range(FEWEST, MOST + 1)) / (MOST - FEWEST + 1)

    def __init__(self, seed: int = 0, side: int = 32) -> None:
        self.seed, self.side = seed, side

    def item(self, index: int, split: str) -> Item:
        def make(rng: random.Random) -> tuple[Chart, str]:
            return make_chart(rng), largest_wording(rng)

        chart, question = draw(
            self.name, self.seed, split, index, make, lambda made: made[0].content
        )
        messages = ask(question, chart.draw(self.side))
        return Item(messages, chart.tallest, _difficulty(chart), chart.content)

    def grade(self, item: Item, reply: str) -> float:
        return exact(item.answer, reply)


class BarValue:
    """What is the value of the red bar? Whole numbers from 1 to 9, equally likely."""

    name = "bar_value"
    chance = 1 / TOP  # any one of the values

    def __init__(self, seed: int = 0, side: int = 32) -> None:
        self.seed, self.side = seed, side

    def item(self, index: int, split: str) -> Item:
        def make(rng: random.Random) -> tuple[Chart, int, str]:
            chart = make_chart(rng)
            bar = rng.randrange(len(chart.values))
            return chart, bar, value_wording(rng, chart.colours[bar])

        chart, bar, question = draw(
            self.name, self.seed, split, index, make, lambda made: made[0].content
        )
        messages = ask(question, chart.draw(self.side))
        return Item(messages, str(chart.values[bar]), _difficulty(chart), chart.content)

    def grade(self, item: Item, reply: str) -> float:
        return exact(item.answer, reply)


def _difficulty(chart: Chart) -> float:
    return (len(chart.values) - FEWEST) / (MOST - FEWEST)
