"""Products with packed integer weights and int8 activations: W8A8 and W4A8 for decoding on a CPU.

    weight = pack(codes, scales)             # int8 codes (N, K), scales (N,): one an output
    weight = pack(codes, scales, group=32)   # int4 codes -8 .. 7 as int8, scales (N, K / 32)
    y = linear(x, weight); y = swiglu(x, gate_up, down); y = experts(x, chosen, gates, gate_up, down)

Codes of routed experts are (E, outputs, inputs): for the fused tensors [E, in, out] transpose the last
two dimensions; gate and up are one matrix of 2F outputs, gate first. Activations become int8 row by
row: scale max|x| / 127, to nearest, ties to even; sums are exact integers, the same on every machine;
y = sum over groups of (integer * weight scale), times the row's scale, in float32. Packing is done when
a model is loaded; packed weights are never stored. Layout: `packed.h`. Left out: weight-only int4, zero
points, K above 131072.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from herdling.errors import InputError
from herdling.kernels.cpu.dense import KINDS, check
from herdling.kernels.cpu.library import loaded
from herdling.kernels.cpu.threads import threads

PANEL = 16  # outputs side by side
MOST_INPUTS = 131072  # so that a sum of products fits 32 bits


@dataclass(frozen=True)
class Packed:
    """One matrix (N outputs, K inputs), or one an expert, ready for the kernels."""

    codes: Tensor  # uint8, flat per matrix
    scales: Tensor  # float32, or float16 with groups
    outputs: int
    inputs: int
    group: int  # inputs a scale; 0: int8 with one scale an output
    experts: int  # 0: a single matrix
    arguments: tuple[int, ...] = field(
        init=False, repr=False, compare=False
    )  # as the kernels take it

    def __post_init__(self) -> None:
        halves = self.scales.dtype == torch.float16
        pointers = self.codes.data_ptr(), self.scales.data_ptr()
        shape = self.outputs, self.inputs, self.group
        object.__setattr__(self, "arguments", (*pointers, *shape, halves))

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def pack(codes: Tensor, scales: Tensor, group: int = 0) -> Packed:
    """Codes (N, K) or (E, N, K) int8 and their scales (..., N) or (..., N, groups) -> Packed.

    With `group` (a multiple of 32) codes are 4 bits, -8 .. 7; the last group may be shorter. Scales
    may be float16 with groups (4.5 bits a weight for 32), else they are kept as float32.
    """
    *lead, N, K = codes.shape
    groups = -(-K // group) if group else 1
    _refuse(codes, scales, group, (*lead, N, groups) if group else (*lead, N))
    deep = -(-K // (group or 4)) * (group or 4)
    codes = torch.nn.functional.pad(codes, (0, deep - K, 0, -N % PANEL)).flatten(
        0, -3 if lead else 0
    )
    codes = codes.view(-1, PANEL, deep)  # all panels of all experts
    if group:
        nibbles = (
            (codes + 8).to(torch.uint8).view(-1, PANEL, deep // 8, 2, 4).permute(0, 2, 3, 1, 4)
        )
        blocks = nibbles[:, :, 0] | nibbles[:, :, 1] << 4
    else:
        blocks = (codes.to(torch.int16) + 128).to(torch.uint8)
        blocks = blocks.view(-1, PANEL, deep // 4, 4).permute(0, 2, 1, 3)
    kept = scales if group and scales.dtype == torch.float16 else scales.float()
    kept = kept.reshape(*lead, N, groups)
    kept = torch.nn.functional.pad(kept, (0, 0, 0, -N % PANEL))
    kept = kept.reshape(-1, PANEL, groups).transpose(1, 2).contiguous()
    experts = lead[0] if lead else 0
    return Packed(blocks.contiguous(), kept, N, K, group, experts)


def _refuse(codes: Tensor, scales: Tensor, group: int, shape: tuple[int, ...]) -> None:
    if codes.dtype != torch.int8 or codes.dim() not in (2, 3):
        raise InputError(
            f"codes {tuple(codes.shape)} {codes.dtype}; expected int8 (N, K) or (E, N, K)"
        )
    if group % 32 or group < 0:
        raise InputError(f"group {group}; expected a multiple of 32, or 0 for int8")
    if codes.shape[-1] > MOST_INPUTS:
        raise InputError(
            f"{codes.shape[-1]} inputs; at most {MOST_INPUTS} keep sums within 32 bits"
        )
    if tuple(scales.shape) != shape:
        raise InputError(
            f"scales {tuple(scales.shape)} for codes {tuple(codes.shape)}; expected {shape}"
        )
    if group and codes.numel() and not -8 <= int(codes.min()) <= int(codes.max()) <= 7:
        raise InputError("4-bit codes outside -8 .. 7")


def linear(x: Tensor, weight: Packed) -> Tensor:
    """x (..., K) float32 or bfloat16 -> (..., N) in x's type."""
    check(x)
    _fits(x, weight)
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], weight.outputs))
    _call("linear", x)(
        x.data_ptr(), *weight.arguments, out.data_ptr(), x.numel() // weight.inputs, threads()
    )  # fmt: skip
    return out


def swiglu(x: Tensor, gate_up: Packed, down: Packed) -> Tensor:
    """down(silu(gate(x)) * up(x)): x (..., D); gate_up of 2F outputs, gate first -> (..., D)."""
    check(x)
    _fits(x, gate_up)
    _belong(gate_up, down)
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], down.outputs))
    _call("swiglu", x)(
        x.data_ptr(), *gate_up.arguments, *down.arguments, out.data_ptr(),
        x.numel() // gate_up.inputs, threads(),
    )  # fmt: skip
    return out


def experts(x: Tensor, chosen: Tensor, gates: Tensor, gate_up: Packed, down: Packed) -> Tensor:
    """As `herdling.kernels.cpu.experts`; rows are quantized after the gate, as they are dispatched."""
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
        x.data_ptr(), chosen.data_ptr(), gates.data_ptr(), *gate_up.arguments, *down.arguments,
        out.data_ptr(), x.shape[0], chosen.numel() // max(1, x.shape[0]), gate_up.experts,
        threads(),
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
