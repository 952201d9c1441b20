"""What training data is made of: an `Example`, a `Source` of them, and the source that reads texts.

A source is a pure function from an index to an example: nothing in it moves, so a run resumes by
remembering a number. `TextSource` gives a fixed collection in a new order each time round;
`herdling.data.records` reads users' files, `herdling.data.spec` opens what `--data` names, and
`herdling.tasks.mixture` turns tasks into sources.
"""

import bisect
import hashlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from herdling.data.split import check_place
from herdling.errors import DataError
from herdling.inputs.tokenizer import Tokenizer

CACHE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Example:
    """One document or conversation, ready for the model."""

    tokens: list[int]
    loss_mask: list[bool]
    """Whether the token is to be predicted. That of the first token says nothing."""
    tiles: torch.Tensor | None
    """(T, 3, S, S) float32, one after another as their patch tokens come; None without images."""
    domain: str
    """What it counts as in reports."""


class Source(Protocol):
    """Where examples come from."""

    name: str
    size: int | None
    """Examples until the same come again in another order; None if new ones never end."""

    def example(self, index: int) -> Example:
        """The example at `index` >= 0: always the same one, from any thread, without limit."""
        ...


class Texts(Protocol):
    """A fixed collection of texts that need not lie in memory."""

    def __len__(self) -> int: ...

    def characters(self, i: int) -> int:
        """The length of text `i`, without reading it if possible."""
        ...

    def text(self, i: int) -> str: ...


class InMemory:
    """Texts from a sequence of strings."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def characters(self, i: int) -> int:
        return len(self._texts[i])

    def text(self, i: int) -> str:
        return self._texts[i]


def document(
    ids: Sequence[int],
    tok: Tokenizer,
    name: str,
    image_ids: Sequence[int] = (),
    tiles: torch.Tensor | None = None,
) -> Example:
    """A whole document: begin_of_text, the images, the text `ids`, end_of_text; loss on the text."""
    tokens = [tok.bos, *image_ids, *ids, tok.end_of_text]
    before = 1 + len(image_ids)
    return Example(tokens, [i >= before for i in range(len(tokens))], tiles, name)


class TextSource:
    """Pretraining examples from texts, in an order that is new each time round.

    With `cut`, texts of more characters are taken in parts of about `cut`, split after a line end
    where one is near, so that one long file does not fill a batch. Only the first part begins with
    begin_of_text and only the last ends with end_of_text. Tokens of recent parts are kept, within
    `cache_bytes`.
    """

    def __init__(
        self,
        name: str,
        texts: Texts,
        tok: Tokenizer,
        *,
        seed: int = 0,
        cut: int | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if len(texts) == 0:
            raise DataError(f"{name}: no text; remedy: name other files, or set split to all")
        self.name = name
        self._texts, self._tok, self._cut = texts, tok, cut
        self._key = f"{name}/{seed}"
        parts = [1 if cut is None else -(-texts.characters(i) // cut) or 1 for i in range(len(texts))]  # fmt: skip
        self._ends = list(itertools.accumulate(parts))
        self.size: int | None = self._ends[-1]
        self._cache = _Cache(cache_bytes)

    def example(self, index: int) -> Example:
        check_place("train", index)
        part = self._cache.get(shuffled(index, self._ends[-1], self._key), self._read)
        tokens = part.tolist()
        return Example(tokens, [True] * len(tokens), None, self.name)

    def _read(self, place: int) -> np.ndarray:
        """The tokens (int32) of the part at `place`, counted through all texts in order."""
        i = bisect.bisect_right(self._ends, place)
        first, last = self._ends[i - 1] if i else 0, self._ends[i] - 1
        text = self._texts.text(i)
        if self._cut is not None:
            a = _border(text, (place - first) * self._cut, self._cut)
            b = len(text) if place == last else _border(text, (place - first + 1) * self._cut, self._cut)  # fmt: skip
            text = text[a:b]
        ids = self._tok.encode(text)
        before = [self._tok.bos] if place == first else []
        after = [self._tok.end_of_text] if place == last else []
        return np.array([*before, *ids, *after], dtype=np.int32)


def _border(text: str, at: int, cut: int) -> int:
    """`at`, or the next line start if one follows within an eighth of `cut`."""
    if at <= 0:
        return 0
    end = text.find("\n", at - 1, at + cut // 8)
    return min(at, len(text)) if end < 0 else end + 1


def shuffled(index: int, count: int, key: str) -> int:
    """Which of `count` things comes at `index`: each once per round of `count`, in a new order.

    A Feistel network on just enough bits, walked until it lands below `count`: no memory, any index.
    """
    round_, place = divmod(index, count)
    digest = hashlib.blake2b(f"{key}/{round_}".encode("utf-8", "surrogatepass"), digest_size=32)
    keys = np.frombuffer(digest.digest(), dtype="<u8").tolist()
    half = max(1, (count - 1).bit_length() + 1 >> 1)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for k in keys:
            left, right = right, left ^ (_mix(right ^ k) & mask)
        place = left << half | right
        if place < count:
            return place


def _mix(x: int) -> int:
    """The 64-bit finaliser of splitmix64: every bit of the result depends on every bit of `x`."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31


class _Cache:
    """Arrays by number, the least recently used dropped beyond `limit` bytes; safe in threads."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._arrays: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, number: int, make: Callable[[int], np.ndarray]) -> np.ndarray:
        with self._lock:
            if number in self._arrays:
                self._arrays.move_to_end(number)
                return self._arrays[number]
        array = make(number)
        with self._lock:
            if number not in self._arrays:
                self._arrays[number] = array
                self._held += array.nbytes
            while self._held > self._limit and self._arrays:
                _, dropped = self._arrays.popitem(last=False)
                self._held -= dropped.nbytes
        return array
