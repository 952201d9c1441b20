"""Tasks on coloured shapes: how many, which corner, which point, which colour, which way one moves.

Scenes are split by their arrangement, so no arrangement asked about in the test split is trained on
by any of these tasks, nor by the captions of `herdling.data.rendered`.
"""

import random
import re

from herdling.data.scenes import (
    COLOURS,
    CORNERS,
    DIRECTIONS,
    MOST,
    Clip,
    Scene,
    Thing,
    colour_wording,
    count_wording,
    direction_wording,
    make_clip,
    make_scene,
    make_target_scene,
    place_wording,
    point_wording,
)
from herdling.data.split import draw
from herdling.tasks.base import LONGEST_REPLY, Item, ask, exact

_POINT = re.compile(r"\(?([0-9])[ ,] ?([0-9])\)?\.?")


class CountShapes:
    """How many shapes are there? 1 to 6, equally likely."""

    name = "count_shapes"
    chance = 1 / MOST  # any one of the counts

    def __init__(self, seed: int = 0, side: int = 32) -> None:
        self.seed, self.side = seed, side

    def item(self, index: int, split: str) -> Item:
        def make(rng: random.Random) -> tuple[Scene, str]:
            return make_scene(rng), count_wording(rng)

        scene, question = draw(
            self.name, self.seed, split, index, make, lambda made: made[0].content
        )
        count = len(scene.things)
        messages = ask(question, scene.draw(self.side))
        return Item(messages, str(count), (count - 1) / (MOST - 1), scene.content)

    def grade(self, item: Item, reply: str) -> float:
        return exact(item.answer, reply)


class LocateShape:
    """In which corner is the circle? With up to two other shapes anywhere."""

    name = "locate_shape"
    chance = 1 / len(CORNERS)  # any one of the corners

    def __init__(self, seed: int = 0, side: int = 32) -> None:
        self.seed, self.side = seed, side

    def item(self, index: int, split: str) -> Item:
        def make(rng: random.Random) -> tuple[Scene, Thing, str]:
            scene, target = make_target_scene(rng, tuple(CORNERS))
            return scene, target, place_wording(rng, target.shape)

        scene, target, question = draw(
            self.name, self.seed, split, index, make, lambda made: made[0].content
        )
        messages = ask(question, scene.draw(self.side))
        return Item(messages, CORNERS[target.cell], (len(scene.things) - 1) / 2, scene.content)

    def grade(self, item: Item, reply: str) -> float:
        return exact(item.answer, reply)


class PointShape:
    """Where is the circle? In tenths of the width and of the height: `3 7`, each at most 1 off."""

    name = "point_shape"
    chance = 1 / 9  # the middle of one of the nine cells

    def __init__(self, seed: int = 0, side: int = 32) -> None:
        self.seed, self.side = seed, side

    def item(self, index: int, split: str) -> Item:
        def make(rng: random.Random) -> tuple[Scene, Thing, str]:
            scene, target = make_target_scene(rng)
            return scene, target, point_wording(rng, target.shape)

        scene, target, question = draw(
            self.name, self.seed, split, index, make, lambda made: made[0].content
        )
        across, down = (int(10 * share) for share in target.centre)
        messages = ask(question, scene.draw(self.side))
        return Item(messages, f"{across} {down}", (len(scene.things) - 1) / 2, scene.content)

    def grade(self, item: Item, reply: str) -> float:
        said = _POINT.fullmatch(reply.strip()) if len(reply) <= LONGEST_REPLY else None
        if said is None:
            return 0.0
        right = map(int, item.answer.split())
        return float(all(abs(int(a) - b) <= 1 for a, b in zip(said.groups(), right, strict=True)))


class ShapeColour:
    """What colour is the circle? With up to two other shapes."""

    name = "shape_colour"
    chance = 1 / len(COLOURS)  # any one of the colours

    def __init__(self, seed: int = 0, side: int = 32) -> None:
        self.seed, self.side = seed, side

    def item(self, index: int, split: str) -> Item:
        def make(rng: random.Random) -> tuple[Scene, Thing, str]:
            scene, target = make_target_scene(rng)
            return scene, target, colour_wording(rng, target.shape)

        scene, target, question = draw(
            self.name, self.seed, split, index, make, lambda made: made[0].content
        )
        messages = ask(question, scene.draw(self.side))
        return Item(messages, target.colour, (len(scene.things) - 1) / 2, scene.content)

    def grade(self, item: Item, reply: str) -> float:
        return exact(item.answer, reply)


class MovingShape:
    """Which way does the shape move? The frames of a clip, as several pictures."""

    name = "moving_shape"
    chance = 1 / len(DIRECTIONS)  # any one of the directions

    def __init__(self, seed: int = 0, side: int = 32, frames: int = 4) -> None:
        self.seed, self.side, self.frames = seed, side, frames

    def item(self, index: int, split: str) -> Item:
        def make(rng: random.Random) -> tuple[Clip, str]:
            clip = make_clip(rng, self.frames)
            return clip, direction_wording(rng, clip.thing.shape)

        clip, question = draw(
            self.name, self.seed, split, index, make, lambda made: made[0].content
        )
        messages = ask(question, *clip.draw(self.side))
        return Item(messages, clip.direction, 0.5, clip.content)

    def grade(self, item: Item, reply: str) -> float:
        return exact(item.answer, reply)
