"""Batches for training, endless and exactly resumable.

    loader = Loader(Mixture(sources), length=512, batch_size=16, pad=tok.pad, seed=0)
    for batch in loader: ...                 # input_ids, labels, positions, documents, pixel_values
    state = loader.state_dict()              # small and plain: it goes into JSON

Examples are read a window at a time (128 rows' worth; fewer where rows are very long), packed, and
the window's rows are handed out in random order. The place of a loader is therefore the place of its
mixture at the start of the window, and a number of rows. A resumed loader reads one window again,
and checks by a digest that the data still says what it said.
"""

import hashlib
import logging
import random
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from herdling import distributed
from herdling.data.mixture import Mixture
from herdling.data.packing import IGNORE, Piece, best_fit, cut, fill_row, stack
from herdling.data.sources import Example
from herdling.errors import ConfigError, DataError

log = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]
WINDOW_TOKENS = 2**20
"""A window is 128 rows, or as many as hold this many tokens, but at least 16."""
TILE_BYTES = 256 * 2**20
"""Tiles of a window that are held; those beyond it are read again when their row is due."""
_MOST_SKIPPED = 1000


class Loader:
    """An endless iterator of packed batches that can tell and restore its place.

    With `prefetch` the next batch is made in a background thread while the last is trained on; the
    state is that of the batches handed out, whatever the thread has done meanwhile.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        length: int,
        batch_size: int,
        pad: int,
        seed: int = 0,
        window_rows: int | None = None,
        prefetch: bool = False,
    ) -> None:
        if window_rows is None:
            window_rows = max(16, min(128, WINDOW_TOKENS // max(1, length)))
        for name, value in (("length", length), ("batch_size", batch_size), ("window_rows", window_rows)):  # fmt: skip
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        self.length, self.batch_size = length, batch_size
        self._mixture, self._pad, self._seed, self._window_rows = mixture, pad, seed, window_rows
        self._counts = {"rows": 0, "tokens": 0, "skipped": 0}
        self._by_source = [0] * len(mixture.sources)
        self._start = mixture.state_dict()
        self._rows: list[list[Piece]] = []
        self._row = 0
        self._digest = ""
        self._warned: set[str] = set()
        self._skipped = 0
        """Examples of the window that were left out; counted when its first row is given."""
        self._thread = ThreadPoolExecutor(1, "loader") if prefetch else None
        self._coming: Future[tuple[Batch, dict[str, Any]]] | None = None
        self._state = self._place()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._thread is None:
            batch, state = self._make()
        else:
            coming = self._coming or self._thread.submit(self._make)
            self._coming = None
            batch, state = coming.result()
            self._coming = self._thread.submit(self._make)
        self._state = state
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The place after the batches handed out so far, of this process; fit for JSON."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place. The batches that follow are those that followed then.

        Raises DataError when the settings differ, or when the data has changed since.
        """
        self._settle()
        for key, mine in (("length", self.length), ("seed", self._seed), ("window_rows", self._window_rows)):  # fmt: skip
            if state[key] != mine:
                raise DataError(
                    f"the run was saved with data {key} {state[key]}, this one has {mine}; "
                    f"remedy: resume with {key} {state[key]}"
                )
        self._mixture.load_state_dict(state["window"])
        self._start, self._rows, self._row = state["window"], [], 0
        if state["row"]:
            self._open_window()
            if self._digest != state["digest"]:
                raise DataError(
                    "the data reads differently from when the run was saved (other files, tokenizer "
                    "or library versions); remedy: restore it, or start a new run"
                )
            self._row = state["row"]
        self._counts = dict(state["counts"])
        self._by_source = [state["tokens"][source.name] for source in self._mixture.sources]
        self._state = state

    def numbers(self) -> dict[str, float]:
        """What was handed out so far, over all processes (each must call): tokens, fill (share of
        places that hold one), skipped examples, and `share/NAME` of the tokens of each source."""
        states = distributed.gather({key: self._state[key] for key in ("counts", "tokens")})
        counts = {key: sum(state["counts"][key] for state in states) for key in self._counts}
        places = counts["rows"] * self.length
        found = {
            "tokens": counts["tokens"],
            "fill": counts["tokens"] / places if places else 0.0,
            "skipped": counts["skipped"],
        }
        for name in self._state["tokens"]:
            own = sum(state["tokens"][name] for state in states)
            found[f"share/{name}"] = own / max(1, counts["tokens"])
        return found

    def close(self) -> None:
        """End the background thread."""
        self._settle()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _settle(self) -> None:
        """Wait for a batch that is being made, and forget it."""
        if self._coming is not None and not self._coming.cancel():
            self._coming.exception()
        self._coming = None

    def _place(self) -> dict[str, Any]:
        if self._row == len(self._rows):  # the window is used up: the place is the next one's start
            window, row, digest = self._mixture.state_dict(), 0, ""
        else:
            window, row, digest = self._start, self._row, self._digest
        names = [source.name for source in self._mixture.sources]
        return {
            "length": self.length,
            "seed": self._seed,
            "window_rows": self._window_rows,
            "window": window,
            "row": row,
            "digest": digest,
            "counts": dict(self._counts),
            "tokens": dict(zip(names, self._by_source, strict=True)),
        }

    def _make(self) -> tuple[Batch, dict[str, Any]]:
        rows, tiles = [], []
        while len(rows) < self.batch_size:
            if self._row == len(self._rows):
                self._start = self._mixture.state_dict()
                self._open_window()
            if self._row == 0:
                self._counts["skipped"] += self._skipped
            pieces = self._rows[self._row]
            self._rows[self._row] = []  # its memory is not needed any more
            self._row += 1
            rows.append(fill_row(pieces, self.length, self._pad))
            tiles += [self._tiles(piece) for piece in pieces if piece.has_tiles]
            self._counts["rows"] += 1
            for piece in pieces:
                self._counts["tokens"] += len(piece.tokens)
                self._by_source[piece.source] += len(piece.tokens)
        return stack(rows, tiles), self._place()

    def _tiles(self, piece: Piece) -> torch.Tensor:
        if piece.tiles is not None:
            return piece.tiles
        tiles = self._mixture.sources[piece.source].example(piece.index).tiles
        assert tiles is not None, f"{self._mixture.sources[piece.source].name} is not pure"
        return tiles

    def _open_window(self) -> None:
        """Read and pack the window that starts where the mixture stands."""
        pieces = self._read_window()
        digest = hashlib.blake2b(digest_size=16)
        for piece in pieces:
            digest.update(piece.tokens.tobytes())
            digest.update(piece.labels.tobytes())
        rows = best_fit([len(piece.tokens) for piece in pieces], self.length)
        # Best-fit decreasing gives the rows of long documents first.
        place = f"{self._seed}/{self._start['rank']}/{self._start['taken']}"
        random.Random(place).shuffle(rows)
        self._rows = [[pieces[i] for i in row] for row in rows]
        self._row, self._digest = 0, digest.hexdigest()

    def _read_window(self) -> list[Piece]:
        pieces: list[Piece] = []
        tokens = held = self._skipped = 0
        while tokens < self._window_rows * self.length:
            number, index, example = self._mixture.next()
            found = cut(example, self.length, number, index)
            # A row of nothing but questions could end a run whose batches are small.
            learnt = [piece for piece in found or () if (piece.labels != IGNORE).any()]
            if not learnt:
                self._skip(example, found is None, not pieces)
                continue
            for piece in learnt:
                tokens += len(piece.tokens)
                if piece.tiles is not None:
                    held += piece.tiles.nbytes
                    piece = piece if held <= TILE_BYTES else replace(piece, tiles=None)
                pieces.append(piece)
        return pieces

    def _skip(self, example: Example, long: bool, alone: bool) -> None:
        """Count an example that no row can hold, or of which nothing is learnt; raise DataError where
        nothing else comes."""
        self._skipped += 1
        if long:
            what = f"{example.domain}: an example with images has {len(example.tokens)} tokens"
            remedy = f"rows hold {self.length}; remedy: a longer row, or smaller or fewer images"
        else:
            what = f"{example.domain}: an example has no token to be learnt"
            remedy = "remedy: examples in which the assistant says something"
        if alone and self._skipped == _MOST_SKIPPED:
            raise DataError(f"{what}, as have {_MOST_SKIPPED} in a row; {remedy}")
        if example.domain not in self._warned:
            self._warned.add(example.domain)
            log.warning("%s; %s. Such examples are left out and counted as 'skipped'", what, remedy)
