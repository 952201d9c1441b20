"""Products with packed low-bit weights, for decoding on a CPU: integer activations, or float ones.

    weight = pack(codes, scales)               # int8 codes (N, K), scales (N,): one an output
    weight = pack(codes, scales, group=32)     # int4 codes -8 .. 7 as int8, scales (N, K / 32)
    weight = pack_ternary(codes, scales)       # -1, 0, 1 in 2 bits, scales (N,)
    weight = pack_mxfp4(codes, scales)         # E2M1 codes 0 .. 15, E8M0 scales (N, K / 32), both uint8
    weight = pack(codes, scales, 32, floats=True)          # weight-only: activations stay what they are
    y = linear(x, weight); y = swiglu(x, gate_up, down); y = experts(x, chosen, gates, gate_up, down)

Codes of routed experts are (E, outputs, inputs): for the fused tensors [E, in, out] transpose the last
two dimensions; gate and up are one matrix of 2F outputs, gate first. Activations become int8 row by
row: scale max|x| / 127, to nearest, ties to even; sums are exact integers, the same on every machine
(E2M1 doubled is an integer); y = sum over groups of (integer * weight scale), times the row's scale, in
float32. With `floats` numbers are looked up and sums are float32. Packing is done when a model is loaded;
packed weights are never stored. Layout: `weight.h`. Left out: zero points, K above 131072.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from herdling.errors import InputError
from herdling.kernels.cpu.dense import KINDS, check
from herdling.kernels.cpu.library import loaded
from herdling.kernels.cpu.threads import threads

PANEL = 16  # outputs side by side
MOST_INPUTS = 131072  # so that a sum of products fits 32 bits
PLAIN, INT8, INT4, MXFP4, TERNARY = range(5)  # weight.h: Kind
BITS = {INT8: 8, INT4: 4, MXFP4: 4, TERNARY: 2}


class WeightStruct(ctypes.Structure):
    """Weight of weight.h, field for field."""

    _fields_ = [
        ("data", ctypes.c_void_p), ("scales", ctypes.c_void_p),
        ("N", ctypes.c_int64), ("K", ctypes.c_int64), ("group", ctypes.c_int64),
        ("kind", ctypes.c_int32), ("scale", ctypes.c_int32), ("floats", ctypes.c_int32),
    ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Packed:
    """One matrix (N outputs, K inputs), or one an expert, ready for the kernels."""

    codes: Tensor  # uint8, flat per matrix
    scales: Tensor  # float32; float16 with groups; uint8 exponents of MXFP4
    outputs: int
    inputs: int
    group: int  # inputs a scale; 0: one scale an output
    experts: int  # 0: a single matrix
    kind: int
    floats: bool  # whether activations stay floats
    struct: WeightStruct = field(init=False, repr=False, compare=False)
    at: int = field(init=False, repr=False, compare=False)
    """Where the struct lies, as the kernels take it."""

    def __post_init__(self) -> None:
        struct = WeightStruct(
            self.codes.data_ptr(), self.scales.data_ptr(), self.outputs, self.inputs, self.group,
            self.kind, self.scales.itemsize, self.floats,
        )  # fmt: skip
        object.__setattr__(self, "struct", struct)
        object.__setattr__(self, "at", ctypes.addressof(struct))

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def parts(self) -> tuple[Tensor, Tensor, list[int]]:
        """What a custom op can take: codes, scales, all else as integers (`of_parts`)."""
        layout = (self.outputs, self.inputs, self.group, self.experts, self.kind, int(self.floats))
        return self.codes, self.scales, list(layout)


def of_parts(codes: Tensor, scales: Tensor, layout: Sequence[int]) -> Packed:
    """The matrix that `Packed.parts` took apart, on the same memory."""
    outputs, inputs, group, experts, kind, floats = layout
    return Packed(codes, scales, outputs, inputs, group, experts, kind, bool(floats))


def pack(codes: Tensor, scales: Tensor, group: int = 0, floats: bool = False) -> Packed:
    """Codes (N, K) or (E, N, K) int8 and their scales (..., N) or (..., N, groups) -> Packed.

    With `group` (a multiple of 32) codes are 4 bits, -8 .. 7; the last group may be shorter. Scales
    may be float16 with groups (4.5 bits a weight for 32), else they are kept as float32.
    """
    if codes.dtype != torch.int8:
        raise InputError(f"codes {tuple(codes.shape)} {codes.dtype}; expected int8")
    if group % 32 or group < 0:
        raise InputError(f"group {group}; expected a multiple of 32, or 0 for int8")
    if group:
        _within(codes, -8, 7, "4-bit codes")
    kept = scales if group and scales.dtype == torch.float16 else scales.float()
    unsigned = (codes + 8).view(torch.uint8) if group else codes.view(torch.uint8) ^ 128
    return _packed(unsigned, kept, group, INT4 if group else INT8, floats)


def pack_ternary(codes: Tensor, scales: Tensor, floats: bool = False) -> Packed:
    """Codes (N, K) or (E, N, K) int8 of -1, 0, 1 and scales (..., N), one an output."""
    _within(codes, -1, 1, "ternary codes")
    return _packed((codes + 1).to(torch.uint8), scales.float(), 0, TERNARY, floats)


def pack_mxfp4(codes: Tensor, scales: Tensor, floats: bool = False) -> Packed:
    """E2M1 codes (N, K) or (E, N, K), 0 .. 15, and E8M0 scales (..., N, ceil(K / 32)), all uint8."""
    if codes.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise InputError(f"codes {codes.dtype}, scales {scales.dtype}; expected both uint8")
    _within(codes, 0, 15, "E2M1 codes")
    _within(scales, 0, 254, "E8M0 scales (255 is NaN)")
    return _packed(codes, scales, 32, MXFP4, floats)


def _within(codes: Tensor, low: int, high: int, name: str) -> None:
    if codes.numel() and not low <= int(codes.min()) <= int(codes.max()) <= high:
        raise InputError(f"{name} outside {low} .. {high}")


def _packed(codes: Tensor, scales: Tensor, group: int, kind: int, floats: bool) -> Packed:
    """Unsigned codes, one a byte, into panels of 16 outputs and blocks of 64 bytes."""
    if codes.dim() not in (2, 3):
        raise InputError(f"codes {tuple(codes.shape)}; expected (N, K) or (E, N, K)")
    *lead, N, K = codes.shape
    groups = -(-K // group) if group else 1
    if K > MOST_INPUTS:
        raise InputError(f"{K} inputs; at most {MOST_INPUTS} keep sums within 32 bits")
    shape = (*lead, N, groups) if group else (*lead, N)
    if tuple(scales.shape) != shape:
        raise InputError(
            f"scales {tuple(scales.shape)} for codes {tuple(codes.shape)}; expected {shape}"
        )
    bits = BITS[kind]
    steps = 8 // bits  # of 4 inputs a block
    unit = group or 4 * steps
    deep = -(-K // unit) * unit
    codes = F.pad(codes, (0, deep - K, 0, -N % PANEL)).reshape(-1, PANEL, deep // (4 * steps), steps, 4)  # fmt: skip
    blocks = codes[..., 0, :]
    for step in range(1, steps):
        blocks = blocks | codes[..., step, :] << step * bits
    kept = F.pad(scales.reshape(*lead, N, groups), (0, 0, 0, -N % PANEL))
    kept = kept.reshape(-1, PANEL, groups).transpose(1, 2).contiguous()
    blocks = blocks.transpose(1, 2).contiguous()  # (panels of all experts, blocks, 16, 4)
    return Packed(blocks, kept, N, K, group, lead[0] if lead else 0, kind, floats)


def unpack(weight: Packed, expert: int | None = None) -> Tensor:
    """The codes (.., N, K) that were packed, one a number: int8, of MXFP4 uint8; of one expert, or all."""
    bits = BITS[weight.kind]
    panels = -(-weight.outputs // PANEL)
    blocks = weight.codes if expert is None else weight.codes[expert * panels :][:panels]
    words = blocks.view(torch.int32)[..., 0].transpose(
        1, 2
    )  # four inputs at once: (panels, 16, blocks)
    if weight.kind == INT8:
        steps = words ^ int.from_bytes(b"\x80" * 4, signed=True)
    else:
        mask = int.from_bytes(bytes([(1 << bits) - 1]) * 4)
        steps = torch.stack([words >> step * bits & mask for step in range(8 // bits)], -1)
    lead = (weight.experts,) if weight.experts and expert is None else ()
    codes = steps.contiguous().view(torch.uint8).view(*lead, panels * PANEL, -1)
    codes = codes[..., : weight.outputs, : weight.inputs]
    if weight.kind == INT8:
        return codes.contiguous().view(torch.int8)
    if weight.kind == MXFP4:
        return codes.contiguous()
    return codes.view(torch.int8) - (8 if weight.kind == INT4 else 1)


def linear(x: Tensor, weight: Packed) -> Tensor:
    """x (..., K) float32 or bfloat16 -> (..., N) in x's type."""
    if torch.compiler.is_compiling():
        return torch.ops.herdling.packed_linear(x, *weight.parts)
    check(x)
    _fits(x, weight)
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], weight.outputs))
    rows = x.numel() // weight.inputs
    _call("linear", x)(x.data_ptr(), weight.at, out.data_ptr(), rows, threads())
    return out


def swiglu(x: Tensor, gate_up: Packed, down: Packed) -> Tensor:
    """down(silu(gate(x)) * up(x)): x (..., D); gate_up of 2F outputs, gate first -> (..., D)."""
    if torch.compiler.is_compiling():
        return torch.ops.herdling.packed_swiglu(x, *gate_up.parts, *down.parts)
    check(x)
    _fits(x, gate_up)
    _belong(gate_up, down)
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], down.outputs))
    rows = x.numel() // gate_up.inputs
    _call("swiglu", x)(x.data_ptr(), gate_up.at, down.at, out.data_ptr(), rows, threads())
    return out


def experts(x: Tensor, chosen: Tensor, gates: Tensor, gate_up: Packed, down: Packed) -> Tensor:
    """As `herdling.kernels.cpu.experts`; rows are quantized after the gate, as they are dispatched."""
    if torch.compiler.is_compiling():
        return torch.ops.herdling.packed_experts(x, chosen, gates, *gate_up.parts, *down.parts)
    gates = gates.to(x.dtype).contiguous()
    check(x, gates)
    _fits(x, gate_up, routed=True)
    _belong(gate_up, down)
    if chosen.dtype != torch.int64 or chosen.shape != gates.shape or chosen.shape[0] != x.shape[0]:
        raise InputError(
            f"chosen {tuple(chosen.shape)} {chosen.dtype} must be int64 and shaped as gates "
            f"{tuple(gates.shape)}, a row for each of x {tuple(x.shape)}"
        )
    x, chosen = x.contiguous(), chosen.contiguous()
    out = torch.empty_like(x)
    wrong = _call("experts", x)(
        x.data_ptr(), chosen.data_ptr(), gates.data_ptr(), gate_up.at, down.at, out.data_ptr(),
        x.shape[0], chosen.numel() // max(1, x.shape[0]), gate_up.experts, threads(),
    )  # fmt: skip
    if wrong:
        raise InputError(f"chosen holds experts outside 0..{gate_up.experts - 1}")
    return out


def _fits(x: Tensor, weight: Packed, routed: bool = False) -> None:
    if x.shape[-1] != weight.inputs:
        raise InputError(f"x is {x.shape[-1]} wide, weight takes {weight.inputs}")
    if bool(weight.experts) != routed:
        raise InputError(f"weight holds {weight.experts or 'no'} experts; wrong operation for it")


def _belong(gate_up: Packed, down: Packed) -> None:
    if (down.inputs * 2, down.outputs, down.experts) != (
        gate_up.outputs,
        gate_up.inputs,
        gate_up.experts,
    ):
        raise InputError(
            f"down ({down.outputs}, {down.inputs}) does not belong to gate_up "
            f"({gate_up.outputs}, {gate_up.inputs})"
        )


def _call(name: str, x: Tensor):
    library = loaded()
    if library is None:
        raise InputError("native kernels are off here; ask herdling.kernels.cpu.available() first")
    return getattr(library, f"herdling_packed_{name}_{KINDS[x.dtype]}")
