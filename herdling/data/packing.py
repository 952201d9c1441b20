"""Full rows from documents of any length, each document alone in its row.

A document longer than a row is cut into pieces, which are fitted into rows best-fit decreasing.
Every piece has a document id of its own in its row and positions from 0, so the model sees it as if
it stood alone. Labels are the next token of the same document: the last token of a document has
none, the last token of a piece is still asked for the first of the next piece.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from herdling.data.sources import Example

IGNORE = -100
"""Label of a token that predicts nothing."""
NO_DOCUMENT = -1
"""Document id of padding."""


@dataclass(frozen=True)
class Piece:
    """As much of an example as stands in one row."""

    tokens: np.ndarray
    """(n,) int32."""
    labels: np.ndarray
    """(n,) int32: the next token, or IGNORE."""
    source: int
    """The number of its source, and its index there: where its tiles can be had again."""
    index: int
    tiles: torch.Tensor | None
    """(T, 3, S, S); None for text, and for tiles that are to be read again."""
    has_tiles: bool


def cut(example: Example, length: int, source: int = 0, index: int = 0) -> list[Piece] | None:
    """The pieces of at most `length` tokens; None for an example with images that needs more.

    A patch token away from its tile would be meaningless, so images are never cut.
    """
    tokens = np.array(example.tokens, dtype=np.int32)
    labels = np.full_like(tokens, IGNORE)
    if len(tokens) > 1:
        labels[:-1] = np.where(example.loss_mask[1:], tokens[1:], IGNORE)
    if example.tiles is not None:
        if len(tokens) > length:
            return None
        return [Piece(tokens, labels, source, index, example.tiles, True)]
    return [
        Piece(tokens[a : a + length], labels[a : a + length], source, index, None, False)
        for a in range(0, len(tokens), length)
    ]


def best_fit(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Rows as lists of item numbers, in ascending order within a row.

    Items are taken longest first, each into the fullest row that still has room for it.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        size = lengths[item]
        if not 0 < size <= length:
            raise ValueError(f"item {item} has {size} tokens; rows hold 1..{length}")
        at = bisect.bisect_left(room, (size, -1))
        free, row = room.pop(at) if at < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
        if free > size:
            bisect.insort(room, (free - size, row))
    return [sorted(row) for row in rows]


def fill_row(pieces: Sequence[Piece], length: int, pad: int) -> dict[str, np.ndarray]:
    """One row of (length,) int64 arrays: input_ids, labels, positions, documents."""
    row = {
        "input_ids": np.full(length, pad, dtype=np.int64),
        "labels": np.full(length, IGNORE, dtype=np.int64),
        "positions": np.zeros(length, dtype=np.int64),
        "documents": np.full(length, NO_DOCUMENT, dtype=np.int64),
    }
    start = 0
    for number, piece in enumerate(pieces):
        end = start + len(piece.tokens)
        row["input_ids"][start:end] = piece.tokens
        row["labels"][start:end] = piece.labels
        row["positions"][start:end] = np.arange(end - start)
        row["documents"][start:end] = number
        start = end
    row["positions"][start:] = np.arange(length - start)
    return row


def stack(rows: Sequence[dict[str, np.ndarray]], tiles: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:  # fmt: skip
    """A batch: (B, T) int64 tensors, and pixel_values (N, 3, S, S) if there are `tiles`."""
    batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    if tiles:
        batch["pixel_values"] = torch.cat(list(tiles))
    return batch
