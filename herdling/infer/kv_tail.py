"""Pages of channel-coded keys that are not full yet: kept as computed, and coded when they are.

Every running sequence has one row for the newest keys of its channel-coded layers: a ring of a page's
positions and as many more as are guessed at a time. When guesses are taken back, the keys of an
earlier page are thus still there as they were computed, and the page is coded again when its last
position is written again.

A token at position p sees keys of the pages before its own from their codes, and those of its own
page up to p as computed. `Fresh` holds that for every piece of a step, however pieces are cut.

Shape letters: N tokens of the step, n positions, t positions of a page, b sequences of a batch, T
positions that they see, H query heads, KV key-value heads, d head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from herdling.infer.pages import Track, zeros
from herdling.kernels.attention import attend_causal, attend_past

if TYPE_CHECKING:
    from herdling.infer.kv_quant import QuantStore
    from herdling.infer.scheduler import Piece


class OpenPages:
    """Rings of newest keys, one row for each running sequence."""

    def __init__(
        self,
        layers: Sequence[int],
        rows: int,
        tokens: int,
        guess: int,
        heads: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """For these `layers`; `tokens` positions are a page, `heads` is (KV, d)."""
        self.tokens, self.size = tokens, tokens + guess
        self.layers = frozenset(layers)
        self._keys = {i: zeros((rows * self.size, *heads), dtype, device) for i in layers}
        self._free = list(range(rows))

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes for keys in self._keys.values())

    def row(self, track: Track) -> int:
        """The track's row; it takes one at first and gives it back when it is cleared."""
        if track.row is None:
            row = track.row = self._free.pop()
            track.at_clear = lambda: self._free.append(row)
        return track.row

    def at(self, track: Track, a: int, b: int) -> Tensor:
        """Where the keys of positions a..b stand (b - a,), on the CPU."""
        return self.row(track) * self.size + torch.arange(a, b) % self.size

    def keys(self, layer: int) -> Tensor:
        """(rows * size, KV, d)."""
        return self._keys[layer]


@dataclass(frozen=True)
class _Long:
    """A piece of several tokens."""

    start: int
    slots: Tensor
    """Of all positions that it sees from codes, and those of the page that it goes on with."""
    head: slice
    """Those last ones among the kept keys."""


class Fresh:
    """What a step needs for layers whose keys are coded by channel; the same for all of them."""

    def __init__(
        self, store: "QuantStore", pieces: Sequence["Piece"], tracks: Sequence[Track]
    ) -> None:
        self._store, device = store, store.device
        self.tails, self.layers = store.tails, store.tails.layers
        self.t = t = store.tails.tokens
        self._of: dict[int, tuple[Track, int]] = {}
        """Track and position of the piece whose first token stands there in the step."""
        self._long: list[_Long] = []
        kept, written, rows, pages, sources = [], [], [], [], []
        held = offset = 0
        behind = sum(piece.end - piece.start for piece in pieces)  # where kept keys follow the new
        for piece, track in zip(pieces, tracks, strict=True):
            s, e = piece.start, piece.end
            base, n = s // t * t, e - s
            self._of[offset] = track, s
            full = range(base, e - t + 1, t)
            head = s - base if n > 1 or full else 0
            if head:
                kept.append(store.tails.at(track, base, s))
            for page in full:
                at = torch.arange(page, page + t)
                sources.append(torch.where(at < s, at - base + held + behind, at - s + offset))
                pages.append(track.pages[(page - track.first) // t])
            if n > 1:
                seen = track.slots(0, max(s, (e - 1) // t * t)).to(device)
                self._long.append(_Long(s, seen, slice(held, held + head)))
            first = max(s, e - store.tails.size)
            written.append(store.tails.at(track, first, e))
            rows.append(torch.arange(offset + first - s, offset + n))
            held, offset = held + head, offset + n
        self._kept = torch.cat(kept).to(device) if kept else None
        self._written, self._rows = torch.cat(written).to(device), torch.cat(rows).to(device)
        self._all = offset == len(self._rows)
        self._pages = torch.tensor(pages, device=device)
        self._sources = torch.stack(sources).to(device) if sources else None

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (N, KV, d); returns v as it will be read, and the kept keys (n, KV, d).

        Kept are those from before the step, of the pages that it goes on with.
        """
        ring = self.tails.keys(layer)
        kept = k[:0] if self._kept is None else ring.index_select(0, self._kept)
        ring.index_copy_(0, self._written, k if self._all else k.index_select(0, self._rows))
        if self._sources is not None:
            keys = torch.cat((k, kept))[self._sources]
            self._store.write_pages(layer, self._pages, keys)
        return self._store.write_values(layer, slots, v), kept

    def places(self, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """For one-token pieces at `rows` (b,) of the step that see up to `width` positions.

        Which of the b * width keys are of the page that the token stands in, and where they are kept.
        """
        to, source = [], []
        for i, row in enumerate(rows.tolist()):
            track, position = self._of[row]
            base = position // self.t * self.t
            to.append(torch.arange(base, position + 1) + i * width)
            source.append(self.tails.at(track, base, position + 1))
        return torch.cat(to).to(self._store.device), torch.cat(source).to(self._store.device)

    def put(self, layer: int, keys: Tensor, places: tuple[Tensor, Tensor]) -> None:
        """Write what `places` tells of over keys (b * width, KV, d) that were read from codes."""
        keys.index_copy_(0, places[0], self.tails.keys(layer).index_select(0, places[1]))

    def behind(
        self, layer: int, number: int, q: Tensor, k: Tensor, v: Tensor, kept: Tensor
    ) -> Tensor:
        """Attention of a piece of several tokens, the `number`th of the step, page by page.

        q (1, n, H, d), k and v (1, n, KV, d) -> (1, n, H, d); `kept` as `write` returned it.
        """
        piece = self._long[number]
        s, t, out = piece.start, self.t, torch.empty_like(q)
        base, end = s // t * t, s + q.shape[1]
        keys, values = self._store.read(layer, piece.slots)
        coded = keys[base:s].clone()
        keys[base:s] = kept[piece.head]  # as the tokens of the same page see them
        for page in range(base, end, t):
            a, b = max(s, page), min(end, page + t)
            new = [x[:, a - s : b - s] for x in (q, k, v)]
            if a:
                past = keys[None, :a], values[None, :a]
                out[:, a - s : b - s] = attend_past(new[0], past, new[1], new[2])
            else:
                out[:, : b - s] = attend_causal(*new)
            if page == base:
                keys[base : base + len(coded)] = coded
        return out
