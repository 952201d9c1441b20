"""The native products as torch custom ops, with shapes for tracing: torch.compile sees through them.

An op takes tensors and numbers only, so a packed matrix comes as `Packed.parts`: codes, scales, layout.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from herdling.kernels.cpu import dense, packed


@torch.library.custom_op("herdling::linear_small", mutates_args=())
def linear_small(x: Tensor, weight: Tensor) -> Tensor:
    return dense.linear(x, weight)


@linear_small.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("herdling::swiglu_small", mutates_args=())
def swiglu_small(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return dense.swiglu(x, gate, up, down)


@swiglu_small.register_fake
def _(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("herdling::experts_small", mutates_args=())
def experts_small(
    x: Tensor, chosen: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    return dense.experts(x, chosen, gates, gate_up, down)


@experts_small.register_fake
def _(x: Tensor, chosen: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("herdling::rms_norm_small", mutates_args=())
def rms_norm_small(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    return dense.rms_norm(x, gain, eps)


@rms_norm_small.register_fake
def _(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("herdling::packed_linear", mutates_args=())
def packed_linear(x: Tensor, codes: Tensor, scales: Tensor, layout: Sequence[int]) -> Tensor:
    return packed.linear(x, packed.of_parts(codes, scales, layout))


@packed_linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, layout: Sequence[int]) -> Tensor:
    return x.new_empty((*x.shape[:-1], layout[0]))


@torch.library.custom_op("herdling::packed_swiglu", mutates_args=())
def packed_swiglu(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    gate_up_layout: Sequence[int],
    down: Tensor,
    down_scales: Tensor,
    down_layout: Sequence[int],
) -> Tensor:
    first = packed.of_parts(gate_up, gate_up_scales, gate_up_layout)
    return packed.swiglu(x, first, packed.of_parts(down, down_scales, down_layout))


@packed_swiglu.register_fake
def _(x: Tensor, *parts: Tensor | Sequence[int]) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("herdling::packed_experts", mutates_args=())
def packed_experts(
    x: Tensor,
    chosen: Tensor,
    gates: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    gate_up_layout: Sequence[int],
    down: Tensor,
    down_scales: Tensor,
    down_layout: Sequence[int],
) -> Tensor:
    first = packed.of_parts(gate_up, gate_up_scales, gate_up_layout)
    return packed.experts(x, chosen, gates, first, packed.of_parts(down, down_scales, down_layout))


@packed_experts.register_fake
def _(x: Tensor, *parts: Tensor | Sequence[int]) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
