"""What all rendered pictures share: colours with names, papers, the font, and the finished piece.

The font is the scalable one inside Pillow; no font file is read or shipped. Coordinates are shares
of the side, so the same layout can be drawn at 32 pixels (one toy tile) or at 336.
"""

import functools
import random
from dataclasses import dataclass

from PIL import Image, ImageFont

from herdling.errors import MissingExtra

RGB = tuple[int, int, int]
PALETTE: dict[str, RGB] = {
    "red": (230, 40, 40),
    "green": (40, 190, 70),
    "blue": (60, 110, 255),
    "yellow": (250, 215, 40),
    "purple": (175, 75, 215),
    "white": (250, 250, 250),
}
DARK_PAPERS: tuple[RGB, ...] = ((8, 8, 12), (34, 38, 46), (52, 44, 40))
# Ink and paper, all far enough apart to be read at 32 pixels.
INKS: tuple[tuple[RGB, RGB], ...] = (
    ((0, 0, 0), (255, 255, 255)),
    ((255, 255, 255), (0, 0, 0)),
    ((20, 30, 110), (250, 240, 215)),
    ((255, 225, 70), (20, 35, 80)),
    ((120, 10, 20), (235, 235, 235)),
    ((190, 255, 190), (15, 60, 30)),
)


@dataclass(frozen=True)
class Question:
    """A question about a picture, with the short answer."""

    about: str
    """Its kind, for example 'count' or 'colour'."""
    text: str
    answer: str


@dataclass(frozen=True)
class Picture:
    """One rendered picture, or the frames of one clip, with what can be said about it."""

    images: tuple[Image.Image, ...]
    caption: str
    questions: tuple[Question, ...]
    content: str
    """What decides its split; see `herdling.data.split`."""


@functools.lru_cache(maxsize=256)
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in scalable font at `size` pixels."""
    found = ImageFont.load_default(size)
    if not isinstance(found, ImageFont.FreeTypeFont):
        raise MissingExtra("Pillow was built without FreeType; remedy: pip install pillow")
    return found


@functools.lru_cache(maxsize=4096)
def text_box(text: str, size: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the ink of `text` drawn at the origin, in pixels."""
    left, top, right, bottom = font(size).getbbox(text)
    return int(left), int(top), int(right), int(bottom)


def one_of(rng: random.Random, *phrasings: str) -> str:
    """One of several wordings of the same question."""
    return rng.choice(phrasings)
