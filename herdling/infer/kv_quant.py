"""The cache in 4 or 8 bits: a store whose pages hold codes and scales.

    Engine(model, tokenizer, kv="mixed")     # or int8, int4

Values are coded token by token, and so are the keys of layers with RoPE; keys of global layers (no
position encoding) channel by channel within a page (see `kv_codes`). What is coded token by token is
coded when it is written, and every token sees all keys and values, its own too, as they come out of
the codes. A page of channel-coded keys is coded when its last position is written; a token sees the
pages before its own from codes and its own as computed (see `kv_tail`). So what a token sees follows
from its position alone, not from how the prompt was cut or who else ran. No group reaches over the
edge of a chunk: chunks are whole pages.

Attention reads what `read` has turned back into the model's type, a layer at a time. Left out: a
kernel on codes.

Shape letters: n positions, t positions of a page, KV key-value heads, d head width, G groups.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from herdling.errors import ConfigError
from herdling.infer import kv_codes
from herdling.infer.kv_tail import Fresh, OpenPages
from herdling.infer.pages import PAGE, Layers, Store, Track, zeros
from herdling.model.config import TextConfig

if TYPE_CHECKING:
    from herdling.infer.scheduler import Piece

LONE_PAGE = 64
"""Positions of a global page in a model without local layers."""


@dataclass(frozen=True)
class Format:
    """How one layer's keys and values are coded."""

    key_bits: int
    value_bits: int
    by_channel: bool
    """Whether keys have a scale for each channel of a page; else for each token."""

    def regions(self, tokens: int, heads: int, d: int) -> list[int]:
        """Bytes of a page's key codes, value codes, key scales and value scales."""
        of_tokens = 2 * tokens * heads * (d // kv_codes.group_of(d))
        sizes = [
            tokens * heads * d * self.key_bits // 8,
            tokens * heads * d * self.value_bits // 8,
            2 * 2 * heads * d if self.by_channel else of_tokens,
            of_tokens,
        ]
        return [size + size % 2 for size in sizes]  # float16 stands at even places


SCHEMES = {
    "int8": (Format(8, 8, False), Format(8, 8, True)),
    "int4": (Format(4, 4, False), Format(4, 4, True)),
    "mixed": (Format(8, 4, False), Format(4, 4, True)),
}
"""For layers with RoPE and without. In `mixed` only keys with RoPE have 8 bits: they lose most by 4."""


class Layout(Layers):
    """Pages with as many global positions as fill what `local_tokens` local ones take."""

    def __init__(self, config: TextConfig, scheme: str) -> None:
        """Raises ConfigError for a scheme that is not known."""
        super().__init__(config)
        if scheme not in SCHEMES:
            raise ConfigError(f"kv is {scheme!r}; use plain, {', '.join(SCHEMES)}")
        d = config.head_dim
        self.scheme, self._heads, self._d = scheme, config.num_key_value_heads, d
        self.formats = [
            SCHEMES[scheme][not config.is_local(i)] for i in range(config.num_hidden_layers)
        ]
        shares = [(is_local, unit, share) for is_local, unit, share in self.places]
        """Where a layer's part lies: its kind, unit, and place among the layers of the unit."""
        local = {self._bytes(f, self.local_tokens) for f, (is_local, _, _)
                 in zip(self.formats, shares, strict=True) if is_local}  # fmt: skip
        whole = {
            f for f, (is_local, _, _) in zip(self.formats, shares, strict=True) if not is_local
        }
        self.local_bytes = max(local, default=0)
        self.unit_bytes = self.share * self.local_bytes
        if not local:
            self.global_tokens = LONE_PAGE
        elif whole:
            self.global_tokens = self._best_tokens(whole)
        self.unit_bytes = max(
            self.unit_bytes, *(self._bytes(f, self.global_tokens) for f in whole), 0
        )
        self.shares = shares
        # A layer is a part of the store by itself, so slots need no offset within a unit.
        self.places = [(is_local, i, 0) for i, (is_local, _, _) in enumerate(shares)]

    def page_bytes(self, dtype: torch.dtype) -> int:
        """Scales included; the model's type is nothing to it."""
        return self.units * self.unit_bytes

    def _bytes(self, form: Format, tokens: int) -> int:
        return sum(form.regions(tokens, self._heads, self._d))

    def _best_tokens(self, formats: set[Format]) -> int:
        """Positions of a global page such that little of a page stays empty, of either kind."""

        def empty(tokens: int) -> float:
            need = max(self._bytes(form, tokens) for form in formats)
            return abs(math.log(need / self.unit_bytes))

        step = self.local_tokens
        return min(range(step, 8 * self.share * step + 1, step), key=empty)

    def regions(self, layer: int) -> list[int]:
        tokens = self.local_tokens if self.shares[layer][0] else self.global_tokens
        return self.formats[layer].regions(tokens, self._heads, self._d)


def layers_of(config: TextConfig, kv: str, page: int = PAGE) -> Layers:
    """How pages are shared under `plain` or a scheme. Raises ConfigError for an unknown one."""
    return Layers(config, page) if kv == "plain" else Layout(config, kv)


def open_store(
    kv: str,
    config: TextConfig,
    budget: int,
    dtype: torch.dtype,
    device: torch.device,
    running: int,
    guess: int,
    page: int = PAGE,
) -> Store:
    """The store under `plain` or a scheme; for the arguments see `QuantStore`."""
    if kv == "plain":
        return Store(config, budget, dtype, device, page)
    return QuantStore(config, budget, dtype, device, kv, running, guess)


class QuantStore(Store):
    """`Store` in codes; a layer is addressed by its number."""

    def __init__(
        self,
        config: TextConfig,
        budget: int,
        dtype: torch.dtype,
        device: torch.device,
        scheme: str,
        running: int,
        guess: int = 0,
    ) -> None:
        """`budget` in bytes, for pages and for the open pages of `running` sequences, of which up to
        `guess` tokens at a time may be taken back.

        `dtype` is the model's, and that of what is read. Raises ConfigError when the budget does not
        hold a single page of each kind.
        """
        self.layers: Layout
        self.layers = layout = Layout(config, scheme)
        self.dtype, self.device = dtype, device
        self.page_bytes = layout.page_bytes(dtype)
        open_layers = [i for i, form in enumerate(layout.formats) if form.by_channel]
        shape = (config.num_key_value_heads, config.head_dim)
        self.tails = OpenPages(
            open_layers, running, layout.global_tokens, guess, shape, dtype, device
        )
        self.pages = (budget - self.tails.nbytes) // self.page_bytes - 1
        if self.pages < 2:
            raise ConfigError(
                f"memory is {budget} bytes; a cache in {scheme} for {running} running requests "
                f"needs at least {3 * self.page_bytes + self.tails.nbytes}"
            )
        size = (self.pages + 1, layout.unit_bytes)
        units = [zeros(size, torch.uint8, device) for _ in range(layout.units)]
        self._parts = [
            _Part(units[unit], layout, i, share, *shape)
            for i, (_, unit, share) in enumerate(layout.shares)
        ]

    def write(self, unit: int, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        part = self._parts[unit]
        place = part.place(slots)
        return part.put_keys(place, k), part.put_values(place, v)

    def write_values(self, unit: int, slots: Tensor, v: Tensor) -> Tensor:
        """Of a layer whose keys are coded by channel; v (n, KV, d) as it will be read."""
        part = self._parts[unit]
        return part.put_values(part.place(slots), v)

    def write_pages(self, unit: int, pages: Tensor, k: Tensor) -> None:
        """Keys (P, t, KV, d) of whole pages (P,), coded by channel."""
        self._parts[unit].put_pages(pages, k)

    def read(self, unit: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        part = self._parts[unit]
        place = part.place(slots)
        return part.keys(place, self.dtype), part.values(place, self.dtype)

    def view(self, unit: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """As `read`; there is nothing in the model's type to look at without a copy."""
        return self.read(unit, torch.arange(first, end, device=self.device))

    def fresh(self, pieces: Sequence["Piece"], tracks: Sequence[Track]) -> Fresh | None:
        return Fresh(self, pieces, tracks) if self.tails.layers else None


Place = tuple[Tensor, Tensor]
"""Page and place in it, each (n,)."""


class _Part:
    """One layer's codes and scales: views into the pages of its unit."""

    def __init__(
        self, unit: Tensor, layout: Layout, layer: int, share: int, heads: int, d: int
    ) -> None:
        local = layout.shares[layer][0]
        self._form = layout.formats[layer]
        tokens = layout.local_tokens if local else layout.global_tokens
        self._stride = tokens * layout.share if local else tokens
        start = share * layout.local_bytes if local else 0
        starts = [start + sum(layout.regions(layer)[:i]) for i in range(4)]
        form, groups = self._form, d // kv_codes.group_of(d)

        def region(i: int, shape: Sequence[int], dtype: torch.dtype = torch.uint8) -> Tensor:
            typed = unit.view(dtype)
            strides = [math.prod(shape[j + 1 :]) for j in range(len(shape))]
            return typed.as_strided(
                (len(unit), *shape), (typed.shape[1], *strides), starts[i] // dtype.itemsize
            )

        self._key_codes = region(0, (tokens, heads, d * form.key_bits // 8))
        self._value_codes = region(1, (tokens, heads, d * form.value_bits // 8))
        of_tokens = (tokens, heads, groups)
        self._key_scale = region(2, (2, heads, d) if form.by_channel else of_tokens, torch.float16)
        self._value_scale = region(3, of_tokens, torch.float16)

    def place(self, slots: Tensor) -> Place:
        return slots // self._stride, slots % self._stride

    def put_keys(self, place: Place, k: Tensor) -> Tensor:
        codes, scale = kv_codes.by_token(k, self._form.key_bits)
        self._key_codes[place], self._key_scale[place] = codes, scale
        return kv_codes.from_token(codes, scale, self._form.key_bits, k.dtype)

    def put_values(self, place: Place, v: Tensor) -> Tensor:
        codes, scale = kv_codes.by_token(v, self._form.value_bits)
        self._value_codes[place], self._value_scale[place] = codes, scale
        return kv_codes.from_token(codes, scale, self._form.value_bits, v.dtype)

    def put_pages(self, pages: Tensor, k: Tensor) -> None:
        codes, scale, low = kv_codes.by_channel(k, self._form.key_bits)
        self._key_codes[pages] = codes
        self._key_scale[pages] = torch.stack((scale, low), 1)

    def keys(self, place: Place, dtype: torch.dtype) -> Tensor:
        bits = self._form.key_bits
        if not self._form.by_channel:
            return kv_codes.from_token(self._key_codes[place], self._key_scale[place], bits, dtype)
        # Scales are as many as the numbers of several tokens: turn whole pages back, then pick.
        pages, which = torch.unique_consecutive(place[0], return_inverse=True)
        scale, low = self._key_scale[pages].unbind(1)
        keys = kv_codes.from_channel(self._key_codes[pages], scale, low, bits, dtype)
        return keys.flatten(0, 1).index_select(0, which * keys.shape[1] + place[1])

    def values(self, place: Place, dtype: torch.dtype) -> Tensor:
        scale = self._value_scale[place]
        return kv_codes.from_token(self._value_codes[place], scale, self._form.value_bits, dtype)
