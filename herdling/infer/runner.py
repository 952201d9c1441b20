"""One step of the model over pieces of many sequences, laid end to end: no padding outside attention.

Everything but attention works on (1, N) tokens, whoever they belong to. In attention each token sees
its own sequence: sequences with one new token are batched, neighbours in length together; a longer
piece goes by itself, its past read from the store and its new keys taken as they are.

Shape letters: N tokens of the step, D model width, H query heads, KV key-value heads, d head width,
R rows whose logits are wanted, V vocabulary, k experts a token.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from herdling import lora
from herdling.infer.native import MANY_ATTENDED, MOST_TOKENS, Native, Step
from herdling.infer.pages import Store, Track
from herdling.infer.scheduler import Piece
from herdling.kernels.attention import attend_causal, attend_chunked, attend_last, attend_past
from herdling.kernels.cpu.layer import Memory, Tokens
from herdling.model.config import TextConfig
from herdling.model.llama import LanguageModel, MultimodalLM, Places, Router, decoder_of

ENCODER_TOKENS = 2**14
"""Patches that the vision encoder takes at once, which bounds its memory."""
WASTE = 2
"""Sequences are padded to one length while the longest has at most so many times the shortest's."""
SHORT = 128
"""Below this length padding costs less than another call."""


class Runner:
    """Runs pieces through a model over one store."""

    def __init__(self, model: LanguageModel, store: Store) -> None:
        self.model, self.store = model, store
        self._adapters = lora.of(model)
        self._changes = self._adapters.changes
        self._decoder = decoder_of(model)
        self._native = Native(self._decoder)
        self._layers = [Layer(store, *place) for place in store.layers.places]
        self._routers = [m for m in self._decoder.modules() if isinstance(m, Router)]

    @property
    def device(self) -> torch.device:
        return next(self._decoder.parameters()).device

    def run(self, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor | None]:
        """Compute the pieces; returns hidden states (N, D), their tokens in the order of `pieces`.

        Also returns the experts chosen, (MoE layers, N, k), or None for a model without MoE layers.
        """
        tokens = [token for piece in pieces for token in piece.tokens]
        ids = torch.tensor(tokens, device=self.device)
        x = self._decoder.model.embed_tokens(ids)
        self._put_images(x, pieces)
        at = Ragged(self.model.config.text, self.store, pieces, self.device)
        if self._changes != self._adapters.changes:  # layers took or lost adapters
            self._native, self._changes = Native(self._decoder), self._adapters.changes
        names = [piece.sequence.request.adapter for piece in pieces]
        adapted = self._adapters.using(names, [len(piece.tokens) for piece in pieces])
        seen, step = sum(piece.end for piece in pieces), None
        routes: list[Tensor] = []
        if self._native.fits and type(self.store) is Store and self.store.dtype == x.dtype:
            attended = sum(len(piece.tokens) * piece.end for piece in pieces)
            most = self._native.longest if attended < MANY_ATTENDED else MOST_TOKENS
            step = Step(at.last, routes) if len(tokens) <= most else None
        with (
            adapted,
            self._native.leaves(len(tokens), seen, step) as fused,
            nullcontext() if fused else self._watching(routes),
        ):
            hidden = self._decoder.model.blocks(x[None], at, self._layers)
        return hidden[0], torch.cat(routes) if routes else None

    def logits(self, hidden: Tensor, adapters: Sequence[str | None]) -> Tensor:
        """(R, D) -> (R, V) float32; `adapters` are the rows', or one for them all."""
        with self._adapters.using(adapters), self._native.leaves(len(hidden)):
            return self._decoder.lm_head(self._decoder.model.norm(hidden)).float()

    def choosing(self, rows: int) -> AbstractContextManager[None]:
        """Around `logits` of so many rows and what chooses from them."""
        return self._native.choosing(rows * self.model.config.text.vocab_size)

    def _put_images(self, x: Tensor, pieces: Sequence[Piece]) -> None:
        """Write the features of patch tokens over their embeddings; tiles are encoded as needed."""
        for name in dict.fromkeys(piece.sequence.request.adapter for piece in pieces):
            needed = [
                (piece.sequence.images, tile)
                for piece in pieces
                if piece.sequence.request.adapter == name
                for tile in piece.sequence.images.needed(piece.start, piece.end)
            ]
            if not needed or not isinstance(self.model, MultimodalLM):
                continue
            pixels = torch.stack([images.tile(n) for images, n in needed])
            with self._adapters.using([name]):
                encoded = encode(self.model, pixels)
            for (images, tile), features in zip(needed, encoded, strict=True):
                images.features[tile] = features
        offset = 0
        for piece in pieces:
            images = piece.sequence.images
            for patch in range(*images.span(piece.start, piece.end)):
                tile, row = divmod(patch, images.a_tile)
                place = offset + images.at[patch] - piece.start
                x[place] = images.features[tile][row].to(x.dtype)
            images.drop_before(piece.end)
            offset += len(piece.tokens)

    @contextmanager
    def _watching(self, routes: list[Tensor]) -> Iterator[None]:
        """Append the experts (1, N, k) that each router chooses, in the order of the layers."""
        hooks = [
            router.register_forward_hook(lambda _, __, out: routes.append(out[0][None]))
            for router in self._routers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class Layer:
    """One layer's part of the store."""

    def __init__(self, store: Store, local: bool, unit: int, share: int) -> None:
        self.store, self.unit = store, unit
        self.offset = share * store.layers.local_tokens if local else 0
        """Slots are counted from the first of the layers that share a unit."""

    @cached_property
    def memory(self) -> Memory:
        """The layer's keys and values for fused blocks; only of a plain store."""
        slots = (self.store.pages + 1) * self.store.layers.global_tokens
        return Memory(*self.store.view(self.unit, 0, slots), self.offset)


class Ragged(Places):
    """Pieces of sequences, end to end."""

    def __init__(
        self, config: TextConfig, store: Store, pieces: Sequence[Piece], device: torch.device
    ) -> None:
        positions = [p for piece in pieces for p in range(piece.start, piece.end)]
        super().__init__(config, torch.tensor([positions], device=device))
        self._store, self._pieces = store, pieces
        memories = [piece.sequence.memory for piece in pieces]
        self._tracks = {False: [m.whole for m in memories], True: [m.local for m in memories]}
        self._chunked = self.chunk is not None and store.layers.has_local

    @cached_property
    def _kinds(self) -> dict[bool, "Kind"]:
        device = self.cos.device
        kinds = {
            local: Kind(self._pieces, tracks, self.chunk if local else None, self._store, device)
            for local, tracks in self._tracks.items()
        }
        return kinds if self._chunked else {local: kinds[False] for local in kinds}

    @property
    def last(self) -> dict[bool, Tokens]:
        """The same for fused blocks, which take each token by itself: what it sees ends with it."""
        seen = {
            local: self._seen(tracks, self.chunk if local else None)
            for local, tracks in self._tracks.items()
            if tracks[0] is not None and (self._chunked or not local)
        }
        return seen if self._chunked else {local: seen[False] for local in (False, True)}

    def _seen(self, tracks: Sequence[Track | None], chunk: int | None) -> Tokens:
        slots = [
            track.slots(at // chunk * chunk if chunk else 0, at + 1)
            for piece, track in zip(self._pieces, tracks, strict=True)
            if track is not None
            for at in range(piece.start, piece.end)
        ]
        fresh = torch.cat([own[-1:] for own in slots])
        temperature = None if self.temperature is None else self.temperature.flatten()
        return Tokens(slots, fresh, self.cos[0], self.sin[0], temperature)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, local: bool, cache: Layer) -> Tensor:
        return self._kinds[local].attend(q, k, v, cache)


class Kind:
    """What the tokens of a step see in the layers of one kind."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        tracks: Sequence[Track | None],
        chunk: int | None,
        store: Store,
        device: torch.device,
    ) -> None:
        self.chunk = chunk
        self._long: list[tuple[int, int, Tensor]] = []
        new, single = [], []
        offset = 0
        for piece, track in zip(pieces, tracks, strict=True):
            if track is None:
                return  # the model has no layer of this kind
            first = piece.start // chunk * chunk if chunk else 0
            new.append(track.slots(piece.start, piece.end))
            if len(piece.tokens) == 1:
                single.append((offset, track.slots(first, piece.end)))
            else:
                past = track.slots(first, piece.start).to(device)
                self._long.append((offset, offset + len(piece.tokens), past))
            offset += len(piece.tokens)
        self._new = torch.cat(new).to(device)
        self._batches = list(_batches(single, device))
        self._plain = not self._long and len(self._batches) == 1
        """Whether one batch in the order of the tokens is all there is."""
        self._fresh = None if chunk else store.fresh(pieces, [t for t in tracks if t])
        if self._fresh:
            for batch in self._batches:
                batch.newest = self._fresh.places(batch.rows, batch.slots.shape[1])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Layer) -> Tensor:
        """q (1, N, H, d), k and v (1, N, KV, d) -> (1, N, H, d)."""
        store, unit, shift = cache.store, cache.unit, cache.offset
        slots = self._new + shift if shift else self._new
        fresh = self._fresh if self._fresh and unit in self._fresh.layers else None
        kept = k[0, :0]
        if fresh:
            values, kept = fresh.write(unit, slots, k[0], v[0])
            v = values[None]
        else:
            k, v = (new[None] for new in store.write(unit, slots, k[0], v[0]))
        if self._plain:
            return self._last(q[0], self._batches[0], cache)[None]
        out = torch.empty_like(q)
        for batch in self._batches:
            out[0, batch.rows] = self._last(q[0, batch.rows], batch, cache)
        for i, (a, b, past) in enumerate(self._long):
            mine, new = q[:, a:b], (k[:, a:b], v[:, a:b])
            if fresh:
                out[:, a:b] = fresh.behind(unit, i, mine, *new, kept)
            else:
                out[:, a:b] = self._behind(mine, *new, self._past(store, unit, past + shift))
        return out

    def _last(self, q: Tensor, batch: "Batch", cache: Layer) -> Tensor:
        """One new token a sequence: q (b, H, d) -> (b, H, d)."""
        keys, values = cache.store.read(cache.unit, (batch.slots + cache.offset).flatten())
        if batch.newest and self._fresh and cache.unit in self._fresh.layers:
            self._fresh.put(cache.unit, keys, batch.newest)
        shape = (*batch.slots.shape, *keys.shape[1:])
        return attend_last(q[:, None], keys.view(shape), values.view(shape), batch.seen)[:, 0]

    def _past(self, store: Store, unit: int, slots: Tensor) -> tuple[Tensor, Tensor] | None:
        n = len(slots)
        if n == 0:
            return None
        first = int(slots[0])
        if int(slots[-1]) - first == n - 1 and bool((slots[1:] > slots[:-1]).all()):
            keys, values = store.view(unit, first, first + n)
        else:
            keys, values = store.read(unit, slots)
        return keys[None], values[None]

    def _behind(
        self, q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        if self.chunk is not None:
            if past is not None:
                k, v = (torch.cat(pair, 1) for pair in zip(past, (k, v), strict=True))
            return attend_chunked(q, k, v, self.chunk)
        return attend_causal(q, k, v) if past is None else attend_past(q, past, k, v)


@dataclass
class Batch:
    """Sequences with one new token each and like length."""

    rows: Tensor
    """(b,) their tokens in the step."""
    slots: Tensor
    """(b, T) all they see, padded with 0, the page of zeros."""
    seen: Tensor | None
    """(b, T) bool, False in the padding."""
    newest: tuple[Tensor, Tensor] | None = None
    """Keys that are not in the store yet; see `kv_tail.Fresh.places`."""


def _batches(single: list[tuple[int, Tensor]], device: torch.device) -> Iterator[Batch]:
    """Batches of (row, slots) pairs; little is padded. One batch keeps the order of the rows."""
    longest = max((len(slots) for _, slots in single), default=0)
    if longest > max(SHORT, WASTE * min((len(slots) for _, slots in single), default=0)):
        single = sorted(single, key=lambda entry: len(entry[1]))
    while single:
        most = max(SHORT, WASTE * len(single[0][1]))
        batch = [entry for entry in single if len(entry[1]) <= most]
        single = single[len(batch) :]
        lengths = [len(slots) for _, slots in batch]
        slots = torch.zeros(len(batch), max(lengths), dtype=torch.int64)
        for i, (_, own) in enumerate(batch):
            slots[i, : len(own)] = own
        seen = None
        if min(lengths) < max(lengths):
            seen = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
            seen = seen.to(device)
        yield Batch(torch.tensor([row for row, _ in batch], device=device), slots.to(device), seen)


@torch.no_grad()
def encode(model: MultimodalLM, tiles: Tensor) -> Tensor:
    """Image features in the decoder's width: tiles (n, 3, S, S) -> (n, tokens_per_tile, D)."""
    vision, device = model.config.vision, next(model.parameters()).device
    assert vision is not None
    at_once = max(1, ENCODER_TOKENS // (vision.grid**2 + 1))
    return torch.cat([model.encode(part.to(device)) for part in tiles.split(at_once)])
