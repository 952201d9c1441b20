"""Writing as pictures: numbers, single words, and pages of lines, all from the built-in font.

The words are real ones, from Python's own standard library. A word belongs to one split wherever it
stands: a page holds words of a single split only.
"""

import functools
import random
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from herdling.data.drawing import INKS, Picture, Question, font, one_of, text_box
from herdling.data.split import SPLITS, split_of
from herdling.errors import ConfigError, DataError

SMALLEST = 8  # pixels; below this the font is a blur
_LEADING = 1.05  # from one line to the next, in sizes
_MARGIN = 0.03  # share of the side kept free around the ink
_WORD = re.compile(r"(?<=\s)[a-z]{3,12}(?=[\s.,;:)])")
_SHORT_SCALES = (0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


@dataclass(frozen=True)
class Page:
    """Lines of text, each one word or number, in one ink on one paper."""

    lines: tuple[str, ...]
    ink: int
    """Row of `INKS`."""
    scale: float
    """Size of the letters as a share of the largest that fits."""
    x: float
    y: float
    """Where the block stands in the free space: 0 left or top, 1 right or bottom."""

    def draw(self, side: int = 32) -> Image.Image:
        """An RGB image of `side` by `side` pixels; the letters are as large as fits, times scale.

        Raises ConfigError when they would have to be smaller than 8 pixels.
        """
        ink, paper = INKS[self.ink]
        image = Image.new("RGB", (side, side), paper)
        pen = ImageDraw.Draw(image)
        room = side - 2 * max(1, round(side * _MARGIN))
        size = max(SMALLEST, int(_largest(self.lines, room) * self.scale))
        boxes = [text_box(line, size) for line in self.lines]
        step = size * _LEADING
        width = max(box[2] - box[0] for box in boxes)
        top, bottom = boxes[0][1], boxes[-1][3] + step * (len(boxes) - 1)
        left = (side - room) / 2 + self.x * max(0, room - width)
        above = (side - room) / 2 + self.y * max(0.0, room - (bottom - top)) - top
        for row, (line, box) in enumerate(zip(self.lines, boxes, strict=True)):
            pen.text((round(left) - box[0], round(above + row * step)), line, ink, font(size))
        return image


@functools.lru_cache(maxsize=8192)
def _largest(lines: tuple[str, ...], room: int) -> int:
    """The largest size in pixels at which the block of lines fits into `room` by `room`."""
    # Start a little above what the widest line at 100 pixels promises, then step down.
    widest = max(text_box(line, 100)[2] - text_box(line, 100)[0] for line in lines)
    size = min(room, int(105 * room / widest) + 2, int(1.1 * room / len(lines)) + 4)
    while size >= SMALLEST:
        boxes = [text_box(line, size) for line in lines]
        height = boxes[-1][3] - boxes[0][1] + size * _LEADING * (len(lines) - 1)
        if height <= room and all(box[2] - box[0] <= room for box in boxes):
            return size
        size -= 1
    raise ConfigError(f"{' / '.join(lines)!r} does not fit legibly in {room} pixels; enlarge side")


def _style(rng: random.Random, lines: tuple[str, ...], scales: tuple[float, ...]) -> Page:
    x, y = (round(rng.random(), 2) for _ in range(2))
    return Page(lines, rng.randrange(len(INKS)), rng.choice(scales), x, y)


@dataclass(frozen=True)
class Number:
    """A written number."""

    page: Page

    @property
    def text(self) -> str:
        return self.page.lines[0]

    @property
    def content(self) -> str:
        """The digits alone; with one or two, too few to set any aside, also ink and size.

        The place is left out: two that differ by a fraction of a pixel give the same picture.
        """
        if len(self.text) > 2:
            return f"number {self.text}"
        return f"number {self.text} {self.page.ink} {self.page.scale}"


def make_number(rng: random.Random, digits: tuple[int, int] = (1, 3)) -> Number:
    """A number of `digits[0]` to `digits[1]` digits, every length equally likely."""
    if not 1 <= digits[0] <= digits[1]:
        raise ConfigError(f"digits is {digits}; use (fewest, most), at least 1")
    length = rng.randint(*digits)
    number = rng.randrange(10 ** (length - 1) if length > 1 else 0, 10**length)
    # A lone digit at full size would be larger than any other writing.
    scales = _SHORT_SCALES if length < 3 else (0.9, 1.0)
    return Number(_style(rng, (str(number),), scales))


def number_wording(rng: random.Random) -> str:
    return one_of(rng, "Which number is this?", "What number is shown?", "Read the number.")


def number_picture(number: Number, rng: random.Random, side: int) -> Picture:
    asked = Question("read", number_wording(rng), number.text)
    return Picture((number.page.draw(side),), f"{number.text}.", (asked,), number.content)


@dataclass(frozen=True)
class Document:
    """A page of words, one a line."""

    page: Page

    @property
    def content(self) -> str:
        """Its first word; the others are of the same split."""
        return f"word {self.page.lines[0]}"


@functools.cache
def words(split: str, longest: int) -> tuple[str, ...]:
    """The words of `split` of three to `longest` letters, in alphabetical order.

    They are the lower-case words that at least two of the standard library's files share; reading
    those takes a tenth of a second, once a process. Raises ConfigError where none is so short.
    """
    if longest < 3:
        raise ConfigError(f"longest is {longest}; it must be at least 3, the shortest word")
    return tuple(
        word for word in _all_words() if len(word) <= longest and split_of(f"word {word}") == split
    )


@functools.cache
def _all_words() -> tuple[str, ...]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    found: Counter[str] = Counter()
    for file in files:
        found.update(set(_WORD.findall(file.read_text("utf-8", errors="replace"))))
    if not found:
        raise DataError("the sources of Python's standard library are missing; install them")
    return tuple(sorted(word for word, count in found.items() if count > 1))


def make_document(rng: random.Random, lines: int = 1, longest: int = 4) -> Document:
    """`lines` different words of at most `longest` letters, all of one split.

    At 32 pixels one word of four letters is legible; at 64 three lines of six.
    """
    if not 1 <= lines <= len(_ORDINALS):
        raise ConfigError(f"lines is {lines}; it must be 1 to {len(_ORDINALS)}")
    split = rng.choices(SPLITS, [len(words(split, longest)) for split in SPLITS])[0]
    chosen = tuple(rng.sample(words(split, longest), lines))
    return Document(_style(rng, chosen, (0.9, 1.0)))


@dataclass(frozen=True)
class Table:
    """A page of words, each with a digit beside it."""

    page: Page
    entries: tuple[tuple[str, int], ...]

    @property
    def content(self) -> str:
        return f"table {', '.join(self.page.lines)}"


def make_table(rng: random.Random, lines: int = 2, longest: int = 3) -> Table:
    """`lines` different words of at most `longest` letters with different digits from 1 to 9."""
    if not 1 <= lines <= len(_ORDINALS):
        raise ConfigError(f"lines is {lines}; it must be 1 to {len(_ORDINALS)}")
    chosen = rng.sample(words("train", longest), lines)
    entries = tuple(zip(chosen, rng.sample(range(1, 10), lines), strict=True))
    page = _style(rng, tuple(f"{word} {digit}" for word, digit in entries), (0.9, 1.0))
    return Table(page, entries)


def beside_wording(rng: random.Random, word: str) -> str:
    return one_of(
        rng, f"Which number stands beside {word}?", f"What is the number of {word}?",
        f"Read the number after {word}.",
    )  # fmt: skip


def word_wording(rng: random.Random, line: int, lines: int) -> str:
    """Ask for the word in `line` (from 0) of `lines`."""
    if lines == 1:
        return one_of(rng, "Which word is this?", "What does it say?", "Read the word.")
    which = _ORDINALS[line]
    return one_of(rng, f"What is the {which} word?", f"Read the {which} line.")


def document_picture(document: Document, rng: random.Random, side: int) -> Picture:
    lines = document.page.lines
    asked = tuple(
        Question("read", word_wording(rng, row, len(lines)), word) for row, word in enumerate(lines)
    )
    return Picture((document.page.draw(side),), " ".join(lines) + ".", asked, document.content)
