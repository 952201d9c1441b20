"""Scenes of coloured shapes on a three-by-three grid, and short clips of one moving shape.

A scene is a layout first (cheap, hashable, decides the split) and an image when it is drawn.
Shapes never overlap: each has a cell to itself and stays inside it.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from herdling.data.drawing import DARK_PAPERS, PALETTE, RGB, Picture, Question, one_of
from herdling.errors import ConfigError

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = tuple(PALETTE)
COLUMNS = ("left", "middle", "right")
ROWS = ("top", "middle", "bottom")
CORNERS = {0: "top left", 2: "top right", 6: "bottom left", 8: "bottom right"}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOST = 6
_TRAVEL = 0.3  # of the side, from the first frame of a clip to its last
_OVER = 4  # drawn this much larger, then averaged down: smooth edges at 32 pixels


@dataclass(frozen=True)
class Thing:
    """One shape: what, which colour, in which cell (0..8, row by row), and where in it."""

    shape: str
    colour: str
    cell: int
    radius: float
    dx: float
    dy: float

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def centre(self) -> tuple[float, float]:
        """Shares of the side, from the left and from the top."""
        return (self.cell % 3 + 0.5) / 3 + self.dx, (self.cell // 3 + 0.5) / 3 + self.dy

    @property
    def place(self) -> str:
        """Its cell in words: 'top left', 'middle right', 'middle' for the centre."""
        row, column = ROWS[self.cell // 3], COLUMNS[self.cell % 3]
        return row if row == column else f"{row} {column}"


@dataclass(frozen=True)
class Scene:
    """Up to six shapes, in the order of their cells."""

    things: tuple[Thing, ...]
    paper: RGB

    @property
    def content(self) -> str:
        """The arrangement; for a lone shape, of which there are few, also its size and the paper.

        The place within the cell is left out: it may move a shape by less than a pixel.
        """
        content = "scene " + ", ".join(f"{thing} {thing.cell}" for thing in self.things)
        first, *others = self.things
        return content if others else f"{content} {first.radius} {self.paper}"

    def draw(self, side: int = 32) -> Image.Image:
        """An RGB image of `side` by `side` pixels."""
        return _draw(self.things, self.paper, side)

    def caption(self) -> str:
        return ", ".join(f"{thing} at the {thing.place}" for thing in self.things) + "."

    def lone_shapes(self) -> list[Thing]:
        """The things whose shape no other thing has, so that 'the circle' is clear."""
        shapes = [thing.shape for thing in self.things]
        return [thing for thing in self.things if shapes.count(thing.shape) == 1]

    def questions(self, rng: random.Random) -> Iterator[Question]:
        """All that can be asked without ambiguity, each in one of several wordings."""
        yield Question("count", count_wording(rng), str(len(self.things)))
        colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
        reds = sum(thing.colour == colour for thing in self.things)
        yield Question("count", f"How many {colour} shapes are there?", str(reds))
        alike = sum(thing.shape == shape for thing in self.things)
        yield Question("count", f"How many {_plural(shape)} are there?", str(alike))
        for thing in self.lone_shapes():
            yield Question("colour", colour_wording(rng, thing.shape), thing.colour)
            if thing.cell in CORNERS:
                yield Question("place", place_wording(rng, thing.shape), CORNERS[thing.cell])
        colours = [thing.colour for thing in self.things]
        for thing in self.things:
            if colours.count(thing.colour) == 1:
                yield Question("shape", f"Which shape is {thing.colour}?", thing.shape)


def make_scene(rng: random.Random, fewest: int = 1, most: int = MOST) -> Scene:
    """A random scene of `fewest` to `most` shapes, every count equally likely."""
    if not 1 <= fewest <= most <= 9:
        raise ConfigError(f"{fewest} to {most} shapes; a scene holds 1 to 9")
    count = rng.randint(fewest, most)
    cells = sorted(rng.sample(range(9), count))
    return Scene(tuple(_make_thing(rng, cell) for cell in cells), rng.choice(DARK_PAPERS))


def make_target_scene(rng: random.Random, cells: Sequence[int] = range(9)) -> tuple[Scene, Thing]:
    """A scene of one to three shapes, and one of them, in one of `cells`, of a shape of its own."""
    count = rng.randint(1, 3)
    cell = rng.choice(cells)
    shape, *others = rng.sample(SHAPES, 3)
    target = _make_thing(rng, cell, shape)
    free = [other for other in range(9) if other != cell]
    around = [_make_thing(rng, c, rng.choice(others)) for c in rng.sample(free, count - 1)]
    things = tuple(sorted([target, *around], key=lambda thing: thing.cell))
    return Scene(things, rng.choice(DARK_PAPERS)), target


def count_wording(rng: random.Random) -> str:
    return one_of(
        rng, "How many shapes are there?", "How many shapes do you see?", "Count the shapes."
    )


def colour_wording(rng: random.Random, shape: str) -> str:
    return one_of(
        rng, f"What colour is the {shape}?", f"Which colour does the {shape} have?",
        f"Name the colour of the {shape}.",
    )  # fmt: skip


def place_wording(rng: random.Random, shape: str) -> str:
    return one_of(
        rng, f"Where is the {shape}?", f"In which corner is the {shape}?",
        f"Which corner holds the {shape}?",
    )  # fmt: skip


def point_wording(rng: random.Random, shape: str) -> str:
    return one_of(
        rng, f"Point at the {shape}: across and down, 0 to 9.",
        f"At which point is the {shape}, across and down from 0 to 9?",
    )  # fmt: skip


def scene_picture(scene: Scene, rng: random.Random, side: int) -> Picture:
    asked = tuple(scene.questions(rng))
    return Picture((scene.draw(side),), scene.caption(), asked, scene.content)


@dataclass(frozen=True)
class Clip:
    """One shape that moves in one direction, an equal step a frame."""

    thing: Thing
    direction: str
    start: tuple[float, float]
    """Centre in the first frame, as shares of the side."""
    frames: int
    paper: RGB

    @property
    def content(self) -> str:
        """All but where it starts, for the reason given at `Scene.content`."""
        thing = self.thing
        return f"clip {thing} {self.direction} {self.frames} {thing.radius} {self.paper}"

    def draw(self, side: int = 32) -> tuple[Image.Image, ...]:
        """The frames, each an RGB image of `side` by `side` pixels."""
        across, down = DIRECTIONS[self.direction]
        steps = [_TRAVEL * step / (self.frames - 1) for step in range(self.frames)]
        x, y = self.start
        return tuple(
            _draw([self.thing], self.paper, side, (x + across * step, y + down * step))
            for step in steps
        )


def make_clip(rng: random.Random, frames: int = 4) -> Clip:
    """A random clip of two or more frames; where it starts does not give away where it goes."""
    if frames < 2:
        raise ConfigError(f"frames is {frames}; a movement needs at least 2")
    thing, direction = _make_thing(rng, 4), rng.choice(tuple(DIRECTIONS))
    start = []
    for move in DIRECTIONS[direction]:
        low = thing.radius + max(0.0, -move * _TRAVEL)
        high = 1 - thing.radius - max(0.0, move * _TRAVEL)
        start.append(round(rng.uniform(low, high), 3))
    return Clip(thing, direction, (start[0], start[1]), frames, rng.choice(DARK_PAPERS))


def direction_wording(rng: random.Random, shape: str) -> str:
    return one_of(
        rng, f"Which way does the {shape} move?", f"In which direction does the {shape} move?"
    )


def clip_picture(clip: Clip, rng: random.Random, side: int) -> Picture:
    question = Question("motion", direction_wording(rng, clip.thing.shape), clip.direction)
    colour = Question("colour", colour_wording(rng, clip.thing.shape), clip.thing.colour)
    caption = f"{clip.thing} moving {clip.direction}."
    return Picture(clip.draw(side), caption, (question, colour), clip.content)


def _make_thing(rng: random.Random, cell: int, shape: str | None = None) -> Thing:
    radius = rng.choice((0.11, 0.125, 0.14))
    slack = 1 / 6 - radius
    dx, dy = (round(rng.uniform(-slack, slack), 3) for _ in range(2))
    return Thing(shape or rng.choice(SHAPES), rng.choice(COLOURS), cell, radius, dx, dy)


def _plural(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"


def _draw(
    things: Sequence[Thing], paper: RGB, side: int, centre: tuple[float, float] | None = None
) -> Image.Image:
    image = Image.new("RGB", (side * _OVER, side * _OVER), paper)
    pen = ImageDraw.Draw(image)
    for thing in things:
        x, y = (share * side * _OVER for share in centre or thing.centre)
        _outline(pen, thing.shape, x, y, thing.radius * side * _OVER, PALETTE[thing.colour])
    return image.reduce(_OVER)


def _outline(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, colour: RGB
) -> None:
    match shape:
        case "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        case "square":
            r *= 0.9  # about the area of the circle, so that size gives nothing away
            pen.rectangle((x - r, y - r, x + r, y + r), fill=colour)
        case "triangle":
            pen.polygon(((x, y - r), (x + r, y + r), (x - r, y + r)), fill=colour)
        case "cross":
            arm = r * 0.36
            pen.rectangle((x - r, y - arm, x + r, y + arm), fill=colour)
            pen.rectangle((x - arm, y - r, x + arm, y + r), fill=colour)
