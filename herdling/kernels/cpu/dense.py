"""Native products in bfloat16 and float32: checks, memory, and the call.

Shape letters: M rows, K and D inputs, N outputs, F inner width, E experts, k experts a token.
"""

import torch
from torch import Tensor

from herdling.errors import InputError
from herdling.kernels.cpu.library import loaded
from herdling.kernels.cpu.threads import threads

KINDS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K) @ weight (N, K)^T -> (..., N), as F.linear."""
    if torch.compiler.is_compiling():
        return torch.ops.herdling.linear_small(x, weight)
    N, K = _shape(weight, 2, "weight")
    check(x, weight)
    _same(x.shape[-1], K, "x", "weight")
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], N))
    _call("linear", x)(
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // K, N, K, threads()
    )  # fmt: skip
    return out


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down @ (silu(gate @ x) * (up @ x)): x (..., D); gate, up (F, D); down (D, F) -> (..., D).

    The inner activation is rounded once (bfloat16) or not at all, where torch rounds three times.
    """
    if torch.compiler.is_compiling():
        return torch.ops.herdling.swiglu_small(x, gate, up, down)
    F, D = _shape(gate, 2, "gate")
    check(x, gate, up, down)
    if up.shape != gate.shape or down.shape != (D, F):
        raise InputError(
            f"up {tuple(up.shape)} and down {tuple(down.shape)} do not belong to gate {tuple(gate.shape)}"
        )
    _same(x.shape[-1], D, "x", "gate")
    x = x.contiguous()
    out = torch.empty_like(x)
    _call("swiglu", x)(
        x.data_ptr(), gate.data_ptr(), up.data_ptr(), down.data_ptr(), out.data_ptr(),
        x.numel() // D, D, F, threads(),
    )  # fmt: skip
    return out


def experts(x: Tensor, chosen: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Sum over the chosen experts of SwiGLU(gate * x), as `routed_experts`.

    x (N, D); chosen (N, k) or (N,) int64; gates alike; gate_up (E, D, 2F); down (E, F, D) -> (N, D).
    The weights of each chosen expert are read once, however many rows chose it (up to 16 at a time).
    """
    if torch.compiler.is_compiling():
        return torch.ops.herdling.experts_small(x, chosen, gates, gate_up, down)
    E, D, F2 = _shape(gate_up, 3, "gate_up")
    gates = gates.to(x.dtype).contiguous()
    check(x, gates, gate_up, down)
    if down.shape != (E, F2 // 2, D):
        raise InputError(
            f"down {tuple(down.shape)} does not belong to gate_up {tuple(gate_up.shape)}"
        )
    if chosen.dtype != torch.int64 or chosen.shape != gates.shape or chosen.shape[0] != x.shape[0]:
        raise InputError(
            f"chosen {tuple(chosen.shape)} {chosen.dtype} must be int64 and shaped as gates "
            f"{tuple(gates.shape)}, a row for each of x {tuple(x.shape)}"
        )
    _same(x.shape[-1], D, "x", "gate_up")
    x, chosen = x.contiguous(), chosen.contiguous()
    out = torch.empty_like(x)
    wrong = _call("experts", x)(
        x.data_ptr(), chosen.data_ptr(), gates.data_ptr(), gate_up.data_ptr(), down.data_ptr(), out.data_ptr(),
        x.shape[0], chosen.numel() // max(1, x.shape[0]), E, D, F2 // 2, threads(),
    )  # fmt: skip
    if wrong:
        raise InputError(f"chosen holds experts outside 0..{E - 1}")
    return out


def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) over the last axis, rounded to x's type, then times gain (D,): model.llama.RMSNorm."""
    if torch.compiler.is_compiling():
        return torch.ops.herdling.rms_norm_small(x, gain, eps)
    check(x, *([] if gain is None else [gain]))
    if gain is not None:
        _same(x.shape[-1], gain.numel(), "x", "gain")
    x = x.contiguous()
    out = torch.empty_like(x)
    D = x.shape[-1]
    _call("rms_norm", x)(
        x.data_ptr(), None if gain is None else gain.data_ptr(), out.data_ptr(), x.numel() // D, D, eps
    )  # fmt: skip
    return out


def check(x: Tensor, *weights: Tensor) -> None:
    """InputError unless all are of one supported type, on the CPU, contiguous weights, no gradient."""
    for t in (x, *weights):
        if t.dtype != x.dtype or x.dtype not in KINDS:
            raise InputError(
                f"{x.dtype} with {t.dtype}; native kernels take all float32 or all bfloat16"
            )
        if t.device.type != "cpu":
            raise InputError(f"tensor on {t.device}; native kernels work on the CPU")
        if t is not x and not t.is_contiguous():
            raise InputError(
                f"weight {tuple(t.shape)} with strides {t.stride()}; make it contiguous"
            )
        if t.requires_grad and torch.is_grad_enabled():
            raise InputError("native kernels have no backward; call them under torch.no_grad()")


def _shape(weight: Tensor, dims: int, name: str) -> torch.Size:
    if weight.dim() != dims:
        raise InputError(f"{name} has {weight.dim()} dimensions, expected {dims}")
    return weight.shape


def _same(got: int, wanted: int, name: str, other: str) -> None:
    if got != wanted:
        raise InputError(f"{name} is {got} wide, {other} takes {wanted}")


def _call(name: str, x: Tensor):
    library = loaded()
    if library is None:
        raise InputError("native kernels are off here; ask herdling.kernels.cpu.available() first")
    return getattr(library, f"herdling_{name}_{KINDS[x.dtype]}")
