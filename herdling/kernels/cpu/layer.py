"""Half a decoder layer in one call, and all layers of a step in one, for tokens of a few sequences.

    attention = Attention(gain, q, k, v, o, heads=8, kv_heads=2, eps=1e-5, local=True, qk_norm=True)
    forward = FeedForward(gain, gate, up, down, 1e-5, router, gate_up, outs, k=1)
    tokens = Tokens(slots, fresh, cos, sin, temperature)      # once a step
    x = attention(x, tokens, Memory(keys, values, shift))     # x (N, D)
    x, chosen = forward(x)                                    # chosen (N, k), or None without experts
    layers = Layers([(attention, forward), ..])
    x, chosen = layers(x, {True: tokens, False: tokens}, memories)    # chosen (layers with experts, N, k)

Each goes from its norm to its residual addition, and rounds where the operations of `model.llama` one
by one round; softmax is float32. A weight is a tensor of x's type or `Packed`, each for itself; what
packed ones want of their rows is made in the same pass. Weights are checked once, when the object is
made, and may be written to; an object is stale when one of them moves. Left out: coded caches, gradients.

Shape letters: N tokens, D model width, H query heads, KV key-value heads, d head width, F and I inner
widths of the shared and the routed experts, E experts, k experts a token.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from herdling.errors import InputError
from herdling.kernels.cpu.dense import KINDS, check
from herdling.kernels.cpu.library import loaded
from herdling.kernels.cpu.packed import PLAIN, Packed, WeightStruct
from herdling.kernels.cpu.threads import threads

P, I, N, F, W = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float, WeightStruct
Weight = Tensor | Packed


def _struct(name: str, **fields: type) -> type[ctypes.Structure]:
    """A struct of layer.h: its fields in their order."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_Attention = _struct("Attention", gain=P, q=W, k=W, v=W, o=W, D=I, H=I, KV=I, d=I, eps=F, local=N, qk_norm=N)  # fmt: skip
_Tokens = _struct("Tokens", N=I, slots=P, ends=P, fresh=P, cos=P, sin=P, temperature=P)
_Memory = _struct("Memory", keys=P, values=P, slots=I, shift=I)
_FeedForward = _struct("FeedForward", gain=P, gate=W, up=W, down=W, router=W, gate_up=W, outs=W, D=I, F=I, I=I, E=I, k=I, eps=F)  # fmt: skip
_Layer = _struct("Layer", attention=P, tokens=P, memory=P, forward=P, chosen=P)


class Tokens:
    """What the tokens of a step see, and where they stand: made once, used by every layer of a kind."""

    def __init__(
        self,
        slots: Sequence[Tensor],
        fresh: Tensor,
        cos: Tensor,
        sin: Tensor,
        temperature: Tensor | None,
    ) -> None:
        """
        Args:
            slots: of each token all it sees, its own last (int64, CPU).
            fresh: (N,) int64, each token's own slot.
            cos, sin: (N, d / 2) float32, of RoPE.
            temperature: (N,) float32, what queries of layers without RoPE are multiplied with.
        """
        ends = torch.tensor([len(own) for own in slots]).cumsum(0)
        flat = torch.cat(list(slots)) if len(slots) > 1 else slots[0].contiguous()
        floats = [cos.contiguous(), sin.contiguous()]
        if temperature is not None:
            floats.append(temperature.contiguous())
        if any(t.dtype != torch.float32 or len(t) != len(slots) for t in floats):
            raise InputError(f"cos, sin and temperature must be float32 with {len(slots)} rows")
        if flat.dtype != torch.int64 or fresh.dtype != torch.int64 or len(fresh) != len(slots):
            raise InputError(
                f"slots {flat.dtype} of {len(slots)} tokens with fresh {tuple(fresh.shape)} "
                f"{fresh.dtype}; both must be int64, a fresh slot a token"
            )
        self.count, self.pairs = len(slots), cos.shape[1]
        self._kept = (flat, ends, fresh.contiguous(), *floats)  # alive while C reads them
        pointers = [t.data_ptr() for t in self._kept]
        self.struct = _Tokens(self.count, *pointers, *([] if temperature is not None else [None]))
        self.at = ctypes.addressof(self.struct)


class Memory:
    """One layer's keys and values (slots, KV, d); the layer's slots are counted from `shift`."""

    def __init__(self, keys: Tensor, values: Tensor, shift: int = 0) -> None:
        check(keys, keys, values)
        if not keys.is_contiguous() or keys.dim() != 3 or keys.shape != values.shape:
            raise InputError(
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)}; expected both "
                "(slots, KV, d), contiguous"
            )
        self.shape, self.dtype = tuple(keys.shape[1:]), keys.dtype
        self._kept = keys, values
        self.struct = _Memory(keys.data_ptr(), values.data_ptr(), keys.shape[0], shift)
        self.at = ctypes.addressof(self.struct)


class Attention:
    """x + o(attention(q, k, v of norm(x)))."""

    def __init__(
        self,
        gain: Tensor,
        q: Weight,
        k: Weight,
        v: Weight,
        o: Weight,
        *,
        heads: int,
        kv_heads: int,
        eps: float,
        local: bool,
        qk_norm: bool,
    ) -> None:
        """`local` layers rotate q and k, and with `qk_norm` scale each head to RMS 1 then."""
        D, d = gain.numel(), _outputs(q) // heads
        matrices = [
            _matrix(gain, name, weight, shape)
            for name, weight, shape in (("q", q, (heads * d, D)), ("k", k, (kv_heads * d, D)),
                                        ("v", v, (kv_heads * d, D)), ("o", o, (D, heads * d)))
        ]  # fmt: skip
        if heads % kv_heads or (local and d % 2):
            raise InputError(f"{heads} heads of width {d} with {kv_heads} KV heads do not fit")
        self.width, self.shape, self.dtype, self.local = D, (kv_heads, d), gain.dtype, local
        self._kept = gain, q, k, v, o
        self._struct = _Attention(gain.data_ptr(), *matrices, D, heads, kv_heads, d, eps, local, qk_norm)  # fmt: skip
        self.at = ctypes.addressof(self._struct)
        self._call = _call("attention", self.dtype)

    def __call__(self, x: Tensor, tokens: Tokens, memory: Memory) -> Tensor:
        """x (N, D) -> (N, D); writes the tokens' keys and values to their slots."""
        _fits(x, self.width, self.dtype)
        self.fits(x, tokens, memory)
        x = x.contiguous()
        out = torch.empty_like(x)
        if x.shape[0] and self._call(
            self.at, tokens.at, memory.at, x.data_ptr(), out.data_ptr(), threads()
        ):
            raise InputError(OUTSIDE)
        return out

    def fits(self, x: Tensor, tokens: Tokens, memory: Memory) -> None:
        """InputError where x, tokens and memory do not belong together."""
        if x.shape[0] != tokens.count or (self.local and tokens.pairs * 2 != self.shape[1]):
            raise InputError(
                f"x {tuple(x.shape)} with {tokens.count} tokens, {tokens.pairs} pairs a head of "
                f"{self.shape[1]}"
            )
        if (memory.shape, memory.dtype) != (self.shape, self.dtype):
            raise InputError(
                f"memory of {memory.shape} {memory.dtype}; expected {self.shape} {self.dtype}"
            )


class FeedForward:
    """x + SwiGLU(norm(x)), with experts x + shared SwiGLU + routed SwiGLU of the gate-scaled norm."""

    def __init__(
        self,
        gain: Tensor,
        gate: Weight,
        up: Weight,
        down: Weight,
        eps: float,
        router: Weight | None = None,
        gate_up: Weight | None = None,
        outs: Weight | None = None,
        k: int = 0,
    ) -> None:
        """gate, up (F, D) and down (D, F); router (E, D).

        Plain experts are fused: gate_up (E, D, 2I) and outs (E, I, D). Packed ones have 2I outputs of
        D inputs, gate first, and D outputs of I inputs.
        """
        D, inner = gain.numel(), _outputs(gate)
        matrices = [
            _matrix(gain, name, weight, shape)
            for name, weight, shape in (
                ("gate", gate, (inner, D)), ("up", up, (inner, D)), ("down", down, (D, inner)))
        ]  # fmt: skip
        E = narrow = 0
        if router is not None and gate_up is not None and outs is not None:
            E = _outputs(router)
            narrow = (gate_up.outputs if isinstance(gate_up, Packed) else gate_up.shape[-1]) // 2
            if isinstance(gate_up, Packed) != isinstance(outs, Packed):
                raise InputError("gate_up and outs of experts must both be packed, or neither")
            matrices += [
                _matrix(gain, "router", router, (E, D)),
                _matrix(gain, "gate_up", gate_up, (E, D, 2 * narrow)),
                _matrix(gain, "outs", outs, (E, narrow, D)),
            ]
        if not (E and 1 <= k <= E) and (E or k or router is not None):
            raise InputError(f"{k} of {E} experts; give router, gate_up, outs and k, or none")
        self.width, self.dtype, self.k = D, gain.dtype, k
        self._kept = gain, gate, up, down, router, gate_up, outs
        nothing = [] if E else [WeightStruct()] * 3
        self._struct = _FeedForward(gain.data_ptr(), *matrices, *nothing, D, inner, narrow, E, k, eps)  # fmt: skip
        self.at = ctypes.addressof(self._struct)
        self._call = _call("feed_forward", self.dtype)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (N, D) -> (N, D), and the experts chosen (N, k) int64 as `torch.topk` would."""
        _fits(x, self.width, self.dtype)
        x = x.contiguous()
        out = torch.empty_like(x)
        chosen = torch.empty(x.shape[0], self.k, dtype=torch.int64) if self.k else None
        where = None if chosen is None else chosen.data_ptr()
        if x.shape[0]:
            self._call(self.at, x.data_ptr(), out.data_ptr(), where, x.shape[0], threads())
        return out, chosen


class Layers:
    """All layers of a decoder in one call."""

    def __init__(self, halves: Sequence[tuple[Attention, FeedForward]]) -> None:
        first = halves[0][0]
        self.width, self.dtype, self._halves = first.width, first.dtype, list(halves)
        for half in (half for pair in halves for half in pair):
            if (half.width, half.dtype) != (self.width, self.dtype):
                raise InputError(f"layers of widths {half.width} and {self.width}, {half.dtype} and {self.dtype}")  # fmt: skip
        choices = {forward.k for _, forward in halves if forward.k}
        if len(choices) > 1:
            raise InputError(f"layers choose {sorted(choices)} experts; one number fits all")
        self.k = max(choices, default=0)
        self._structs = (_Layer * len(halves))()
        for struct, (attention, forward) in zip(self._structs, halves, strict=True):
            struct.attention, struct.forward = attention.at, forward.at
        self._call = _call("layers", self.dtype)

    def __call__(
        self, x: Tensor, tokens: dict[bool, Tokens], memories: Sequence[Memory]
    ) -> tuple[Tensor, Tensor | None]:
        """x (N, D) -> (N, D), experts chosen (layers with experts, N, k) int64 or None.

        `tokens` of layers with RoPE (True) and without; a memory a layer.
        """
        _fits(x, self.width, self.dtype)
        x = x.contiguous()
        out = torch.empty_like(x)
        routed = sum(forward.k > 0 for _, forward in self._halves)
        chosen = torch.empty(routed, x.shape[0], self.k, dtype=torch.int64) if routed else None
        at = 0 if chosen is None else chosen.data_ptr()
        for struct, (attention, forward), memory in zip(
            self._structs, self._halves, memories, strict=True
        ):
            attention.fits(x, tokens[attention.local], memory)
            struct.tokens, struct.memory = tokens[attention.local].at, memory.at
            if forward.k:
                struct.chosen = at
                at += 8 * x.shape[0] * self.k
        if x.shape[0] and self._call(
            ctypes.addressof(self._structs), len(self._halves), x.data_ptr(), out.data_ptr(),
            x.shape[0], threads(),
        ):  # fmt: skip
            raise InputError(OUTSIDE)
        return out, chosen


OUTSIDE = "slots outside the memory, or a token that sees none"


def _outputs(weight: Weight) -> int:
    return weight.outputs if isinstance(weight, Packed) else weight.shape[0]


def _matrix(gain: Tensor, name: str, weight: Weight, shape: tuple[int, ...]) -> WeightStruct:
    """The struct of a weight of this shape; InputError for one that does not belong to `gain`."""
    check(gain)
    if isinstance(weight, Packed):
        inputs, outputs = (shape[1], shape[2]) if len(shape) == 3 else (shape[1], shape[0])
        experts = shape[0] if len(shape) == 3 else 0
        if (weight.experts, weight.outputs, weight.inputs) != (experts, outputs, inputs):
            raise InputError(
                f"{name} holds {weight.experts} experts, {weight.outputs} outputs of {weight.inputs} "
                f"inputs; expected {experts}, {outputs} and {inputs}"
            )
        return weight.struct
    with torch.no_grad():
        check(gain, gain, weight)
    if tuple(weight.shape) != shape:
        raise InputError(f"{name} is {tuple(weight.shape)}; expected {shape}")
    if not weight.is_contiguous():
        raise InputError(f"{name} {shape} with strides {weight.stride()}; make it contiguous")
    return WeightStruct(weight.data_ptr(), None, shape[0], shape[-1], 0, PLAIN, 0, 0)


def _fits(x: Tensor, width: int, dtype: torch.dtype) -> None:
    if x.dim() != 2 or x.shape[1] != width or x.dtype != dtype or x.device.type != "cpu":
        raise InputError(
            f"x {tuple(x.shape)} {x.dtype} on {x.device}; expected (N, {width}) {dtype} on the CPU"
        )
    if torch.is_grad_enabled():
        raise InputError("native kernels have no backward; call them under torch.no_grad()")


def _call(name: str, dtype: torch.dtype):
    library = loaded()
    if library is None:
        raise InputError("native kernels are off here; ask herdling.kernels.cpu.available() first")
    return getattr(library, f"herdling_{name}_step_{KINDS[dtype]}")
