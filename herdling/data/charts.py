"""Bar charts: two to five bars of different colours and different whole values from 1 to 9.

The values are drawn evenly at random on purpose: with counts from real text the tallest bar could
be guessed without looking. From 96 pixels on, the axis carries numbers.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

from herdling.data.drawing import DARK_PAPERS, PALETTE, RGB, Picture, Question, font, one_of

FEWEST, MOST, TOP = 2, 5, 9
_GRID: RGB = (120, 120, 130)


@dataclass(frozen=True)
class Chart:
    """Bars from left to right."""

    colours: tuple[str, ...]
    values: tuple[int, ...]
    paper: RGB

    @property
    def content(self) -> str:
        return f"chart {self.bars}"

    @property
    def bars(self) -> str:
        pairs = zip(self.colours, self.values, strict=True)
        return ", ".join(f"{colour} {value}" for colour, value in pairs)

    @property
    def tallest(self) -> str:
        return self.colours[self.values.index(max(self.values))]

    @property
    def smallest(self) -> str:
        return self.colours[self.values.index(min(self.values))]

    def draw(self, side: int = 32) -> Image.Image:
        """An RGB image of `side` by `side` pixels; a thin line marks the height of 5."""
        image = Image.new("RGB", (side, side), self.paper)
        pen = ImageDraw.Draw(image)
        left = side // 8 if side >= 96 else 0
        floor = side - 1 - side // 16
        unit = (floor - side // 16) / TOP
        for mark in (0, 5):
            height = round(floor - mark * unit)
            pen.line((left, height, side, height), fill=_GRID)
            if left:
                pen.text((left / 2, height), str(mark), _GRID, font(side // 12), "mm")
        slot = (side - left) / len(self.values)
        for place, (colour, value) in enumerate(zip(self.colours, self.values, strict=True)):
            x = left + slot * (place + 0.18)
            box = (round(x), round(floor - value * unit), round(x + slot * 0.64) - 1, floor - 1)
            pen.rectangle(box, fill=PALETTE[colour])
        return image

    def questions(self, rng: random.Random) -> Iterator[Question]:
        yield Question("largest", largest_wording(rng), self.tallest)
        yield Question("smallest", "Which bar is the shortest?", self.smallest)
        for colour, value in zip(self.colours, self.values, strict=True):
            yield Question("value", value_wording(rng, colour), str(value))
        yield Question("count", "How many bars are there?", str(len(self.values)))


def make_chart(rng: random.Random) -> Chart:
    """Two to five bars, every number equally likely; no two share a colour or a value."""
    count = rng.randint(FEWEST, MOST)
    colours = tuple(rng.sample(tuple(PALETTE), count))
    return Chart(colours, tuple(rng.sample(range(1, TOP + 1), count)), rng.choice(DARK_PAPERS))


def largest_wording(rng: random.Random) -> str:
    return one_of(
        rng, "Which bar is the tallest?", "What colour is the tallest bar?",
        "Which colour has the largest value?",
    )  # fmt: skip


def value_wording(rng: random.Random, colour: str) -> str:
    return one_of(
        rng, f"What is the value of the {colour} bar?", f"How tall is the {colour} bar?",
        f"Read the value of {colour}.",
    )  # fmt: skip


def chart_picture(chart: Chart, rng: random.Random, side: int) -> Picture:
    asked = tuple(chart.questions(rng))
    return Picture((chart.draw(side),), f"Bar chart: {chart.bars}.", asked, chart.content)
