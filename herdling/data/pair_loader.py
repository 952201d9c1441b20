"""Batches of preference pairs, endless and exactly resumable.

    loader = PairLoader(sources, tok, count=512, batch_size=8, length=512, seed=0)
    loader.reference = ...                           # (len(loader), 2): see herdling.recipes.dpo
    for batch in loader: ...

A fixed set of pairs is chosen once, by the weights of its sources, and gone through again and again,
each round in a new order. Answers are packed into rows like documents: both of a pair are in the same
batch, not necessarily in the same row. A batch has, beside the tensors of `herdling.data.loader`,

    labels      -100 but for the tokens to be read: chosen answers whole, rejected ones where they count
    counted     (B, T) bool: the tokens of the preference
    sequences   (B, T) int64: which answer a token belongs to, 2 * pair for chosen, + 1 for rejected
    reference   (pairs, 2) float32: log-probabilities of both under the reference
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from herdling.data.mixture import by_turns
from herdling.data.packing import IGNORE, Piece, best_fit, fill_row, stack
from herdling.data.preferences import Pair, PairSource, Shared, counted
from herdling.data.sources import shuffled
from herdling.errors import ConfigError, DataError
from herdling.inputs.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class PairLoader:
    """An endless iterator of batches over a fixed set of pairs; of `world` processes one takes its own."""

    def __init__(
        self,
        sources: Sequence[tuple[PairSource, float]],
        tok: Tokenizer,
        *,
        count: int,
        batch_size: int,
        length: int,
        without: Shared = "format",
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        for name, value in (("pairs", count), ("batch", batch_size), ("length", length)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        names = [source.name for source, _ in sources]
        if len(set(names)) < len(names):
            raise ConfigError(f"pairs of {', '.join(names)}: each may be named once")
        self._sources = [source for source, _ in sources]
        self._tok, self.length = tok, length
        self.without: Shared = without
        self.batch_size, self._seed, self._rank, self._world = batch_size, seed, rank, world
        self.skipped = 0
        """Pairs left out because an answer with its question is longer than a row."""
        self._digest = hashlib.blake2b(digest_size=16)
        self._places = self._choose([weight for _, weight in sources], count)
        self.digest = self._digest.hexdigest()
        """What the pairs say, as one word: another word, other pairs."""
        self.reference = torch.zeros(len(self), 2)
        """Log-probabilities of both answers of each pair under the reference model."""
        self._taken = 0

    def __len__(self) -> int:
        return len(self._places)

    def shares(self) -> dict[str, float]:
        """The share of the pairs that came from each source."""
        names = [source.name for source in self._sources]
        of = [number for number, _ in self._places]
        return {name: of.count(i) / len(of) for i, name in enumerate(names)}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            first = (self._taken * self._world + self._rank) * self.batch_size
            self._taken += 1
            yield self.batch(
                [
                    shuffled(k, len(self), f"pairs/{self._seed}")
                    for k in range(first, first + self.batch_size)
                ]
            )

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self._taken, "digest": self.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place. Raises DataError when the pairs are others than they were."""
        if state["digest"] != self.digest:
            raise DataError(
                "the pairs read differently from when the run was saved (other files, tokenizer or "
                "library versions); remedy: restore them, or start a new run"
            )
        self._taken = state["taken"]

    def batch(self, chosen: Sequence[int]) -> dict[str, torch.Tensor]:
        """The batch of these pairs, in this order."""
        pieces: list[Piece] = []
        masks: list[np.ndarray] = []
        for place in chosen:
            number, index = self._places[place]
            pair = self._sources[number].pair(index)
            for piece, mask in _pieces(pair, counted(pair, self._tok, self.without)):
                pieces.append(piece)
                masks.append(mask)
        rows, tiles = [], []
        for row in best_fit([len(piece.tokens) for piece in pieces], self.length):
            filled = fill_row([pieces[i] for i in row], self.length, self._tok.pad)
            of = filled["documents"]
            filled["sequences"] = np.where(of < 0, -1, np.array(row)[of])
            filled["counted"] = np.zeros(self.length, dtype=bool)
            marks = np.concatenate([masks[i] for i in row])
            filled["counted"][: len(marks)] = marks
            rows.append(filled)
            tiles += [tile for i in row if (tile := pieces[i].tiles) is not None]
        return stack(rows, tiles) | {"reference": self.reference[list(chosen)]}

    def _choose(self, weights: Sequence[float], count: int) -> list[tuple[int, int]]:
        """(number of the source, index) of each pair; of a file's pairs none comes twice."""
        places: list[tuple[int, int]] = []
        fitting: set[int] = set()
        for number, index in by_turns([source.size for source in self._sources], weights):
            source = self._sources[number]
            pair = source.pair(index)
            if max(len(pair.chosen.tokens), len(pair.rejected.tokens)) > self.length:
                self._skip(source.name, index + 1, number in fitting)
                continue
            fitting.add(number)
            places.append((number, index))
            for side in (pair.chosen, pair.rejected):
                self._digest.update(np.array(side.tokens, dtype=np.int32).tobytes())
                self._digest.update(np.array(side.loss_mask, dtype=bool).tobytes())
                if side.tiles is not None:
                    self._digest.update(side.tiles.numpy().tobytes())
            if len(places) == count:
                break
        if not places:
            raise DataError(f"no pair fits a row of {self.length} tokens; remedy: a larger length")
        return places

    def _skip(self, name: str, tried: int, found: bool) -> None:
        if not self.skipped:
            log.warning("%s: pairs longer than a row of %d tokens are left out", name, self.length)
        self.skipped += 1
        if tried >= 1000 and not found:
            raise DataError(
                f"{name}: none of {tried} pairs fits a row of {self.length} tokens; remedy: a larger "
                "length, or smaller or fewer images"
            )


def _pieces(pair: Pair, masks: tuple[list[bool], list[bool]]) -> Iterator[tuple[Piece, np.ndarray]]:
    """Both answers as pieces of a row, each with its counted tokens: all shifted to predict the next."""
    for side, mask, rejected in zip(
        (pair.chosen, pair.rejected), masks, (False, True), strict=True
    ):
        tokens = np.array(side.tokens, dtype=np.int32)
        learnt = np.array(mask if rejected else side.loss_mask)
        labels, counts = np.full_like(tokens, IGNORE), np.zeros(len(tokens), dtype=bool)
        labels[:-1] = np.where(learnt[1:], tokens[1:], IGNORE)
        counts[:-1] = np.array(mask)[1:]
        yield Piece(tokens, labels, 0, 0, side.tiles, side.tiles is not None), counts
