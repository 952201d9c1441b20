"""The keys and values a decoder keeps between calls.

Global layers keep every position. Local layers keep the current chunk only: a token at the start of
a chunk sees nothing before it, so the store is emptied at each boundary and never holds more than
one chunk (`nbytes` shows it). Buffers grow by doubling, local ones up to the chunk.
Keys are stored rotated and normed, never temperature-scaled.
"""

import torch
from torch import Tensor

from herdling.errors import InputError
from herdling.model.config import TextConfig


class Cache:
    """Keys and values of one batch of rows that advance together.

    `length` counts the columns seen so far, padding included. Rows may stand at unequal positions:
    then the model records each column's position and document here.
    """

    def __init__(self, config: TextConfig) -> None:
        self.chunk = config.attention_chunk_size
        self.layers = [
            LayerCache(self.chunk if config.is_local(i) else None)
            for i in range(config.num_hidden_layers)
        ]
        self.length = 0
        self.local_start = 0
        """First column that local layers still hold."""
        self.positions: Tensor | None = None
        """(B, length), only when positions or documents were given."""
        self.documents: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, all layers."""
        return sum(layer.nbytes for layer in self.layers)

    def record(self, positions: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
        """Remember positions and documents (B, T) of new columns; returns those of all columns.

        Raises InputError for padding behind a row's tokens: it would outlive the chunk it stands in.
        """
        B = positions.shape[0]
        if self.positions is None or self.documents is None:
            self.positions = torch.arange(self.length, device=positions.device).expand(B, -1)
            self.documents = torch.zeros_like(self.positions)
        real = torch.cat([self.documents[:, -1:], documents], 1) >= 0
        if bool((real[:, :-1] & ~real[:, 1:]).any()):
            raise InputError("padding behind a row's tokens; with a cache, pad at the left")
        self.positions = torch.cat([self.positions, positions], 1)
        self.documents = torch.cat([self.documents, documents], 1)
        return self.positions, self.documents

    def advance(self, columns: int) -> None:
        """Called once after all layers took `columns` new ones: moves on and drops dead chunks."""
        self.length += columns
        if self.chunk is None:
            return
        if self.positions is None or self.documents is None:
            start = self.length // self.chunk * self.chunk
        else:
            # A row's next position opens a new chunk, or continues the one that began so many
            # columns ago. Rows of nothing but padding so far hold no key for anybody.
            padding = self.documents[:, -1] < 0
            live = ((self.positions[:, -1] + 1) % self.chunk).masked_fill(padding, 0)
            start = self.length - int(live.max())
        drop = max(start, self.local_start) - self.local_start
        for layer in self.layers:
            if layer.chunk is not None and drop:
                layer.drop(drop)
        self.local_start += drop


class LayerCache:
    """One layer's store; `chunk` is its bound, None for a global layer."""

    def __init__(self, chunk: int | None) -> None:
        self.chunk = chunk
        self.held = 0
        self._pending: tuple[Tensor, Tensor] | None = None
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self._keys, self._values) if t is not None)

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, T, KV, d) new columns; returns all that are held, old before new."""
        if self.chunk is None:
            return self._store(k, v)
        if self.held + k.shape[1] <= self.chunk:
            return self._store(k, v)
        # A long prefill: attention reads all of it once, `drop` keeps the last chunk's part.
        if self._keys is not None and self._values is not None and self.held:
            k = torch.cat([self._keys[:, : self.held], k], 1)
            v = torch.cat([self._values[:, : self.held], v], 1)
        self._pending = k, v
        return k, v

    def drop(self, columns: int) -> None:
        """Forget the oldest `columns` columns."""
        if self._pending is not None:
            (k, v), self._pending = self._pending, None
            self.held = 0
            if columns < k.shape[1]:
                self._store(k[:, columns:], v[:, columns:])
            return
        rest = self.held - columns
        for buffer in (self._keys, self._values):
            if rest and buffer is not None:
                buffer[:, :rest] = buffer[:, columns : self.held].clone()
        self.held = rest

    def _store(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        end = self.held + k.shape[1]
        keys, values = self._keys, self._values
        if keys is None or values is None or end > keys.shape[1]:
            keys, values = self._grow(k, end)
        keys[:, self.held : end] = k
        values[:, self.held : end] = v
        self.held = end
        return keys[:, :end], values[:, :end]

    def _grow(self, like: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        room = 16
        while room < columns:
            room *= 2
        if self.chunk is not None:
            room = min(room, self.chunk)
        shape = (like.shape[0], room, *like.shape[2:])
        keys, values = like.new_empty(shape), like.new_empty(shape)
        for new, old in ((keys, self._keys), (values, self._values)):
            if old is not None:
                new[:, : self.held] = old[:, : self.held]
        self._keys, self._values = keys, values
        return keys, values
