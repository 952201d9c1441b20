"""Keys and values of many sequences in one block of memory, cut into pages of equal size.

A page holds `global_tokens` positions of all global layers, or `local_tokens` positions of all local
ones: both take the same bytes, so one free list serves both kinds, and what is in use is counted
exactly. A global layer's pages grow with the sequence; a local layer's pages are given back when
their chunk is over. Pages whose content is known by a digest can be shared by sequences, and stay
after the last one until the room is needed (least recently used first).

Shape letters: KV key-value heads, d head width. A slot is a page's number times its positions plus
the place in it; page 0 is zero and never given out, so that padded indices may point to slot 0.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from herdling.errors import ConfigError
from herdling.model.config import TextConfig

if TYPE_CHECKING:
    from herdling.infer.kv_tail import Fresh
    from herdling.infer.scheduler import Piece

PAGE = 16
"""Positions of a local page unless an engine is told otherwise, or the largest power of two below that divides the chunk."""


class Layers:
    """How the layers of a model share a page."""

    def __init__(self, config: TextConfig, page: int = PAGE) -> None:
        kinds = [config.is_local(i) and config.attention_chunk_size is not None
                 for i in range(config.num_hidden_layers)]  # fmt: skip
        local, whole = sum(kinds), len(kinds) - sum(kinds)
        self.has_local, self.has_global = local > 0, whole > 0
        self.chunk = config.attention_chunk_size if local else None
        self.units = whole or local
        """Tensors that a page is spread over: one for each global layer."""
        self.share = max(1, math.ceil(local / self.units))
        """Local layers that lie in one unit, one behind the other."""
        self.local_tokens = math.gcd(self.chunk, page) if self.chunk else page
        self.global_tokens = self.local_tokens * self.share
        seen = [0, 0]
        self.places: list[tuple[bool, int, int]] = []
        """For each layer: whether it is local, its unit, and its share of the unit."""
        for is_local in kinds:
            n = seen[is_local]
            seen[is_local] += 1
            self.places.append((is_local, *divmod(n, self.share)) if is_local else (False, n, 0))
        self.slot_size = 2 * config.num_key_value_heads * config.head_dim
        """Numbers that one position of one unit takes, keys and values."""

    def page_bytes(self, dtype: torch.dtype) -> int:
        return self.units * self.global_tokens * self.slot_size * dtype.itemsize

    def position_bytes(self, dtype: torch.dtype) -> int:
        """What one position of all global layers takes, or of all local ones, about."""
        return -(-self.page_bytes(dtype) // self.global_tokens)


class Store:
    """The memory, and the two operations on it: write new positions, read any."""

    def __init__(
        self,
        config: TextConfig,
        budget: int,
        dtype: torch.dtype,
        device: torch.device,
        page: int = PAGE,
    ) -> None:
        """`budget` in bytes. Raises ConfigError when it does not hold a single page of each kind."""
        self.layers = layers = Layers(config, page)
        self.dtype = dtype
        self.page_bytes = layers.page_bytes(dtype)
        self.pages = budget // self.page_bytes - 1  # less the page of zeros
        if self.pages < 2:
            raise ConfigError(
                f"memory is {budget} bytes; the cache needs at least {3 * self.page_bytes}"
            )
        slots = (self.pages + 1) * layers.global_tokens
        shape = (slots, config.num_key_value_heads, config.head_dim)
        self._keys = [zeros(shape, dtype, device) for _ in range(layers.units)]
        self._values = [zeros(shape, dtype, device) for _ in range(layers.units)]

    def write(self, unit: int, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v (n, KV, d) of the positions that have these slots (n,); as they will be read."""
        self._keys[unit].index_copy_(0, slots, k)
        self._values[unit].index_copy_(0, slots, v)
        return k, v

    def fresh(self, pieces: Sequence["Piece"], tracks: Sequence["Track"]) -> "Fresh | None":
        """For a step of global layers: how to treat pages that are coded when they are full."""
        return None

    def read(self, unit: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (n, KV, d) of slots (n,)."""
        return self._keys[unit].index_select(0, slots), self._values[unit].index_select(0, slots)

    def view(self, unit: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """The same for slots first..end without a copy."""
        return self._keys[unit][first:end], self._values[unit][first:end]


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take no memory before they are written to, where the system can do that."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


def _nothing() -> None:
    pass


class Pages:
    """Who holds which page. Pages are counted: a shared one is free when its last holder lets go."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = deque(range(1, count + 1))
        self._holders = [0] * (count + 1)
        self._digest: dict[int, bytes] = {}
        self._known: dict[bytes, int] = {}
        self._routes: dict[bytes, Tensor] = {}
        self._idle: OrderedDict[int, None] = (
            OrderedDict()
        )  # known pages without holder, oldest first

    @property
    def available(self) -> int:
        """Pages that `take` could give."""
        return len(self._free) + len(self._idle)

    @property
    def cached(self) -> int:
        return len(self._idle)

    def take(self, local: bool = False) -> int:
        """A page for one holder; one that was only kept for reuse is forgotten if it must be.

        Local pages come from one end of the free ones and go back there, others from the other: so
        the few that local layers need are used again and again, and a global layer's lie in a row.
        """
        if self._free:
            page = self._free.pop() if local else self._free.popleft()
        else:
            page, _ = self._idle.popitem(last=False)
            digest = self._digest.pop(page)
            del self._known[digest]
            self._routes.pop(digest, None)
        self._holders[page] = 1
        return page

    def find(self, digest: bytes) -> int | None:
        """The page with this content."""
        return self._known.get(digest)

    def hold(self, page: int) -> None:
        """One more holder."""
        self._holders[page] += 1
        self._idle.pop(page, None)

    def name(self, page: int, digest: bytes) -> None:
        """Say what a page holds; content that another page holds already stays with that one."""
        if digest not in self._known and page not in self._digest:
            self._known[digest] = page
            self._digest[page] = digest

    def note(self, digest: bytes, routes: Tensor) -> None:
        """Keep the experts (tokens, MoE layers, k) of known content, for as long as it is known."""
        if digest in self._known:
            self._routes[digest] = routes

    def noted(self, digest: bytes) -> Tensor | None:
        """The experts of this content, if they were noted."""
        return self._routes.get(digest)

    def release(self, pages: Iterable[int], local: bool = False) -> None:
        """One holder less for each; the first ones are the first to be forgotten."""
        back = self._free.append if local else self._free.appendleft
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._digest:
                self._idle[page] = None
            else:
                back(page)

    def forget(self) -> None:
        """No content is known any more, as when the weights have changed."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._known.clear()
        self._digest.clear()
        self._routes.clear()


class Track:
    """One sequence's pages of one kind, from the position `first` on."""

    def __init__(self, tokens: int, share: int) -> None:
        """`tokens` positions lie in a page; a page's number is multiplied by `share` times those."""
        self.tokens, self._stride = tokens, tokens * share
        self.pages: list[int] = []
        self.first = 0
        self.row: int | None = None
        """Where keys wait that are coded a page at a time (`kv_tail`)."""
        self.at_clear: Callable[[], None] = _nothing
        self._slots = torch.empty(0, dtype=torch.int64)

    @property
    def end(self) -> int:
        """Positions below have a page."""
        return self.first + len(self.pages) * self.tokens

    def missing(self, end: int) -> int:
        """Pages to add before positions below `end` have one."""
        return max(0, -((self.end - end) // self.tokens))

    def add(self, page: int) -> None:
        n = len(self.pages) * self.tokens
        if n + self.tokens > len(self._slots):
            grown = torch.empty(max(64, 2 * n + self.tokens), dtype=torch.int64)
            grown[:n] = self._slots[:n]
            self._slots = grown
        start = page * self._stride
        self._slots[n : n + self.tokens] = torch.arange(start, start + self.tokens)
        self.pages.append(page)

    def drop_before(self, position: int) -> list[int]:
        """Take off whole pages below `position`; returns them, the last first."""
        count = min((position - self.first) // self.tokens, len(self.pages))
        if count <= 0:
            return []
        dropped, self.pages = self.pages[:count], self.pages[count:]
        self._slots = self._slots[count * self.tokens :].clone()
        self.first += count * self.tokens
        return dropped[::-1]

    def clear(self) -> list[int]:
        """Take off all pages; returns them, the last first."""
        dropped, self.pages, self.first = self.pages[::-1], [], 0
        self.at_clear()
        self.row, self.at_clear = None, _nothing
        return dropped

    def slots(self, a: int, b: int) -> Tensor:
        """Slots (b - a,) int64 of positions a..b, on the CPU."""
        return self._slots[a - self.first : b - self.first]
