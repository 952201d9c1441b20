"""Several greedy steps of a small decoder in one call, for several sequences at once.

    guesser = Guesser(embed, gain, head, 1e-5, [(attention, forward, memory), ...], chunk=128)
    guesser([Reader(unread, place, count, whole, local, first), ...], cos, sin, temperature)

Layers are those of `layer.py`. Each sequence's unread tokens are read, its likeliest next token is
found, read, and so on, `count` times. Left out: drawing tokens, gradients.

Shape letters: D model width, V vocabulary, d head width.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from herdling.errors import InputError
from herdling.kernels.cpu.dense import KINDS, check
from herdling.kernels.cpu.layer import Attention, FeedForward, Memory
from herdling.kernels.cpu.library import loaded
from herdling.kernels.cpu.threads import threads

P, I, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Guesser(ctypes.Structure):
    _fields_ = [(n, P) for n in ("embed", "gain", "head")] + [
        (n, I) for n in ("D", "V", "count", "pairs", "chunk", "k")
    ]  # fmt: skip
    _fields_ += [("eps", F)] + [
        (n, P) for n in ("attention", "forward", "memory", "rope", "cos", "sin", "temperature")
    ]  # fmt: skip
    _fields_ += [("places", I)]


class _Readers(ctypes.Structure):
    _fields_ = [("N", I)] + [
        (n, P) for n in ("tokens", "ends", "place", "counts", "whole", "local", "first")
    ]  # fmt: skip


@dataclass
class Reader:
    """A sequence, and how many tokens are to be guessed for it."""

    unread: Sequence[int]
    """Tokens to read first, one at least."""
    place: int
    """Position of the first of them."""
    count: int
    """Tokens to guess; 0: only read."""
    whole: Tensor | None
    """Slots of the positions from 0 on, for layers that see all; int64."""
    local: Tensor | None
    """Slots of the positions from `first` on, for layers that see their chunk."""
    first: int = 0

    @property
    def end(self) -> int:
        """Positions below are written to."""
        return self.place + len(self.unread) + max(self.count - 1, 0)


class Guesser:
    """A decoder of few layers with its caches."""

    def __init__(
        self,
        embed: Tensor,
        gain: Tensor,
        head: Tensor,
        eps: float,
        layers: Sequence[tuple[Attention, FeedForward, Memory]],
        chunk: int | None,
    ) -> None:
        """embed and head (V, D), gain (D,); `chunk` is that of layers that rotate, None for all."""
        V, D = embed.shape
        with torch.no_grad():
            check(gain, embed, gain, head)
        if head.shape != (V, D) or gain.shape != (D,):
            raise InputError(f"embed {(V, D)} with head {tuple(head.shape)}, gain {tuple(gain.shape)}")  # fmt: skip
        if not (embed.is_contiguous() and head.is_contiguous() and layers):
            raise InputError("embed and head must be contiguous, and there must be a layer")
        for attention, forward, memory in layers:
            if attention.width != D or forward.width != D or attention.shape != memory.shape:
                raise InputError("layers, memories and embedding do not belong together")
            if {attention.dtype, forward.dtype, memory.dtype} != {gain.dtype}:
                raise InputError("layers, memories and embedding are of different types")
        library = loaded()
        if library is None:
            raise InputError("native kernels are off here; ask herdling.kernels.cpu.available() first")  # fmt: skip
        self._call = getattr(library, f"herdling_guess_{KINDS[gain.dtype]}")
        count = len(layers)
        pointers = [
            (P * count)(*(part.at for part in parts)) for parts in zip(*layers, strict=True)
        ]
        rope = (ctypes.c_int32 * count)(*(attention.local for attention, _, _ in layers))
        k = max(forward.k for _, forward, _ in layers)
        self._pairs = layers[0][0].shape[1] // 2
        self._kept = embed, gain, head, layers, pointers, rope
        self._struct = _Guesser(
            embed.data_ptr(), gain.data_ptr(), head.data_ptr(), D, V, count, self._pairs, chunk or 0, k,
            eps, *map(ctypes.addressof, pointers), ctypes.addressof(rope),
        )  # fmt: skip
        self._has_whole = any(not a.local or not chunk for a, _, _ in layers)
        self._has_local = any(a.local and chunk for a, _, _ in layers)

    def __call__(
        self, readers: Sequence[Reader], cos: Tensor, sin: Tensor, temperature: Tensor | None
    ) -> list[list[int]]:
        """The tokens guessed for each; writes keys and values of all that was read to their slots.

        cos, sin (positions, d / 2) and temperature (positions,) float32 say where positions stand.
        """
        for reader in readers:
            end = reader.end
            for needed, slots, first in ((self._has_whole, reader.whole, 0),
                                         (self._has_local, reader.local, reader.first)):  # fmt: skip
                if needed and (
                    slots is None or slots.dtype != torch.int64 or len(slots) < end - first
                ):
                    raise InputError(f"slots do not reach to position {end}")
            if not reader.unread or end > len(cos):
                raise InputError(f"nothing to read, or a position above the {len(cos)} prepared")
        tables = [cos, sin] if temperature is None else [cos, sin, temperature]
        for table in tables:
            if table.dtype != torch.float32 or not table.is_contiguous() or len(table) != len(cos):
                raise InputError(
                    "cos, sin and temperature must be contiguous float32 of one length"
                )
        if cos.shape[1] != self._pairs or sin.shape != cos.shape:
            raise InputError(
                f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)} for {self._pairs} pairs"
            )
        N, most = len(readers), max(reader.count for reader in readers)
        numbers = [
            [token for reader in readers for token in reader.unread],
            list(accumulate(len(reader.unread) for reader in readers)),
            [reader.place for reader in readers],
            [reader.count for reader in readers],
        ]
        slots = [
            (P * N)(*(None if t is None else t.data_ptr() for t in tables))
            for tables in ([r.whole for r in readers], [r.local for r in readers])
        ]
        firsts = (I * N)(*(reader.first for reader in readers))
        arrays = [*((I * len(values))(*values) for values in numbers), *slots, firsts]
        struct = _Readers(N, *map(ctypes.addressof, arrays))
        own = self._struct
        own.cos, own.sin, own.places = cos.data_ptr(), sin.data_ptr(), len(cos)
        own.temperature = None if temperature is None else temperature.data_ptr()
        out = (I * max(1, N * most))()
        if self._call(
            ctypes.addressof(own), ctypes.addressof(struct), ctypes.addressof(out), threads()
        ):
            raise InputError("a token outside the vocabulary, or slots outside the memory")
        return [out[i * most : i * most + reader.count] for i, reader in enumerate(readers)]
