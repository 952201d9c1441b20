"""Users' text files, read where they lie: which bytes are a document, and how they become text.

Files are read through once when they are opened, so that a broken byte is an error with its file
and line before the first step of a run. After that only places are kept, and texts are read again
when their turn comes.
"""

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from herdling.data.split import SPLITS, split_of
from herdling.errors import ConfigError, DataError

PART_BYTES = 64 * 1024
"""A plain text file is cut into documents of at most this many bytes, at line ends where it can."""


def keeper(split: str) -> Callable[[str], bool]:
    """Whether content belongs to 'train', 'validation' or 'test'; everything belongs to 'all'."""
    if split not in (*SPLITS, "all"):
        raise ConfigError(f"split is {split!r}; use one of {', '.join(SPLITS)}, all")
    return lambda content: split == "all" or split_of(content) == split


def decode(raw: bytes, errors: str, path: Path, line: int) -> str:
    """UTF-8 to text; `errors` is 'strict' (DataError with file and line) or 'replace' (U+FFFD)."""
    if errors not in ("strict", "replace"):
        raise ConfigError(f"encoding_errors is {errors!r}; use strict or replace")
    try:
        return raw.decode("utf-8", errors)
    except UnicodeDecodeError as problem:
        at = line + raw.count(b"\n", 0, problem.start)
        raise DataError(
            f"{path}:{at}: byte 0x{raw[problem.start]:02x} is not UTF-8; remedy: convert the file, "
            "or set encoding_errors to replace"
        ) from None


def lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset, line) of a file, a byte order mark left out."""
    start = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                mark = 3 if number == 1 and line.startswith(b"\xef\xbb\xbf") else 0
                yield number, start + mark, line[mark:]
                start += len(line)
    except OSError as problem:
        raise DataError(f"{path}: cannot be read: {problem.strerror}") from None


@dataclass(frozen=True)
class Stretch:
    """Some bytes of a file, and the line on which they begin."""

    path: Path
    start: int
    length: int
    line: int

    def read(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                return file.read(self.length)
        except OSError as problem:
            raise DataError(f"{self.path}: cannot be read: {problem.strerror}") from None


class Stretches:
    """Many stretches of few files, at 32 bytes each."""

    def __init__(self) -> None:
        self._paths: list[Path] = []
        self._columns = tuple(array("q") for _ in range(4))

    def add(self, path: Path, start: int, length: int, line: int) -> None:
        if not self._paths or self._paths[-1] != path:
            self._paths.append(path)
        values = (len(self._paths) - 1, start, length, line)
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)

    def __len__(self) -> int:
        return len(self._columns[0])

    def __getitem__(self, i: int) -> Stretch:
        file, start, length, line = (column[i] for column in self._columns)
        return Stretch(self._paths[file], start, length, line)


def _pieces(line: bytes) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of a line in pieces of at most PART_BYTES that tear no character of it."""
    at = 0
    while len(line) - at > PART_BYTES:
        end = at + PART_BYTES
        # A character has at most three continuation bytes; more are broken, and told by `decode`.
        while line[end] & 0xC0 == 0x80 and end > at + PART_BYTES - 3:
            end -= 1
        yield at, line[at:end]
        at = end
    yield at, line[at:]


class TextFiles:
    """The `Texts` of plain text files: the parts of one split. White space alone is no document."""

    def __init__(self, paths: Sequence[Path], split: str = "all", errors: str = "strict") -> None:
        self._errors, self._keep = errors, keeper(split)
        self._stretches, self._characters = Stretches(), array("q")
        for path in paths:
            part, first, begin = bytearray(), 1, 0
            for number, start, line in lines(path):
                for at, piece in _pieces(line):
                    if part and len(part) + len(piece) > PART_BYTES:
                        self._add(path, begin, bytes(part), first)
                        part.clear()
                    if not part:
                        first, begin = number, start + at
                    part += piece
            self._add(path, begin, bytes(part), first)

    def _add(self, path: Path, start: int, raw: bytes, line: int) -> None:
        text = decode(raw, self._errors, path, line)
        if text.strip() and self._keep(text):
            self._stretches.add(path, start, len(raw), line)
            self._characters.append(len(text))

    def __len__(self) -> int:
        return len(self._stretches)

    def characters(self, i: int) -> int:
        return self._characters[i]

    def text(self, i: int) -> str:
        place = self._stretches[i]
        return decode(place.read(), self._errors, place.path, place.line)
