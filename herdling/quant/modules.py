"""Linears and routed experts whose weights are codes and scales, in the place of the plain ones.

A matrix is held as packed codes, outputs by inputs, inputs last (of experts: one after the other), and
becomes numbers when it is multiplied by: that of a linear whole, of experts those that were chosen, one
at a time, in the backward too. Weights get no gradient, inputs an exact one; rounded activations pass
theirs on as if they had not been rounded (straight through).

Without gradients, on a CPU with native kernels, products of int8, int4, MXFP4 and ternary weights with int8
activations or plain ones take `kernels.cpu.packed` up to `MOST_ROWS` rows. The layout that it needs is made
at first use and takes the place of the codes, so that they are held once.

Shape letters: E experts, D model width, F expert width, M rows.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from herdling.kernels import cpu
from herdling.kernels.cpu import packed as native
from herdling.kernels.grouped_matmul import Groups, autocast, grouped_matmul
from herdling.quant import blocks, packing
from herdling.quant.elements import E2M1, TERNARY, Integers
from herdling.quant.experts import StepwiseExperts
from herdling.quant.formats import Format, Quantized, decode, quantize, round_trip

MOST_ROWS = 64
"""Rows up to which the native kernels are faster than dequantizing and torch's products."""

SLAB = 2**23
"""Numbers that are rounded at once."""


class Matrix(nn.Module):
    """One matrix, or one an expert, as codes and scales. No parameter: it is not trained.

    `shape` is what the plain weight's is: (out, in), or (E, in, out) of fused experts.
    """

    codes: Tensor
    """uint8 (.., out, bytes); empty while they are in the kernels' layout. `stored` has them always."""
    scales: Tensor
    """(.., out in blocks, in in blocks)"""

    def __init__(
        self,
        form: Format,
        outputs: int,
        inputs: int,
        experts: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """An empty one, to be filled; `dtype` is that of the numbers it stands for."""
        super().__init__()
        if experts and form.per == "tensor":  # no scale spans experts
            form = replace(form, per="expert")
        self.form, self.outputs, self.inputs, self.experts = form, outputs, inputs, experts
        self.dtype = dtype
        lead = (experts,) if experts else ()
        codes = (*lead, outputs, packing.packed_length(inputs, form.bits))
        self.register_buffer("codes", torch.empty(codes, dtype=torch.uint8, device=device))
        full = (*lead, outputs, inputs)
        block = blocks.block_shape(full, -1, form.per, form.group)
        counts = [-(-n // size) for n, size in zip(full, block, strict=True)]
        scales = torch.empty(counts, dtype=form.scale_dtype, device=device)
        self.register_buffer("scales", scales)
        self._packed: native.Packed | None = None
        self._threefold: bool | None = None

    @classmethod
    def of(cls, weight: Tensor, form: Format, dtype: torch.dtype | None = None) -> "Matrix":
        """A plain weight (out, in) or fused experts (E, in, out), rounded to the nearest.

        `dtype` is that of its numbers when dequantized, by default the weight's.
        """
        plain = weight.detach()
        lead = plain.shape[0] if plain.dim() == 3 else 0
        rows = plain.mT if lead else plain
        made = cls(form, rows.shape[-2], rows.shape[-1], lead, dtype or plain.dtype, plain.device)
        # Some rows at a time where they are independent: copies in float32 are made on the way.
        whole = form.per in ("tensor", "expert", "square")
        count = made.outputs if whole else max(1, SLAB // made.inputs)
        for e in range(max(1, lead)):
            for start in range(0, made.outputs, count):
                part = slice(start, start + count)
                made.put(quantize((rows[e] if lead else rows)[part], form), e, part)
        return made

    @torch.no_grad()
    def put(self, q: Quantized, expert: int = 0, rows: slice = slice(None)) -> None:
        """Take a quantized matrix (out, in), or some of its rows; of experts, that of one of them."""
        self.restore()
        codes, scales = (t[expert] if self.experts else t for t in (self.codes, self.scales))
        codes[rows].copy_(q.packed())
        (scales if self.form.per in ("tensor", "expert", "square") else scales[rows]).copy_(
            q.scales
        )

    @property
    def shape(self) -> torch.Size:
        if self.experts:
            return torch.Size((self.experts, self.inputs, self.outputs))
        return torch.Size((self.outputs, self.inputs))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales as a file has them."""
        length = packing.packed_length(self.inputs, self.form.bits)
        return max(1, self.experts) * self.outputs * length + self.scales.nbytes

    def integers(self, expert: int | None = None) -> Tensor:
        """The codes one a number: (.., out, in) int8 or uint8."""
        codes, packed = self.codes, self._packed
        if packed is not None:
            return native.unpack(packed, expert)
        codes = codes if expert is None else codes[expert]
        signed = self.form.element.signed
        return packing.unpack(codes, self.form.bits, self.inputs, -1, signed)

    def stored(self, expert: int | None = None) -> Tensor:
        """The codes packed as a file has them: uint8 (.., out, bytes); of one expert, or all."""
        if self._packed is not None:
            return packing.pack(self.integers(expert), self.form.bits)
        return self.codes if expert is None else self.codes[expert]

    def restore(self) -> None:
        """Back from the kernels' layout, so that `codes` may be read and written."""
        self._threefold = None
        if self._packed is not None:
            self.codes, self._packed = self.stored(), None

    # Copies, moves and state dicts are of the codes: the kernels' layout is this machine's.
    def __getstate__(self) -> dict[str, Any]:
        self.restore()
        return self.__dict__

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.restore()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)

    def dense(self, dtype: torch.dtype | None = None, expert: int | None = None) -> Tensor:
        """The numbers, outputs by inputs: of one expert, or of all there is."""
        scales = self.scales if expert is None else self.scales[expert]
        numbers = decode(self.integers(expert), scales, self.form, -1)
        # What is computed with is what a file of this type would hold: rounded to it first.
        return numbers.to(self.dtype).to(dtype or self.dtype)

    def __getitem__(self, expert: int, /) -> Tensor:
        """The matrix (in, out) of an expert, as `grouped_matmul` asks for it."""
        return self.dense(expert=expert).T

    def packed(self, activations: Format | None) -> native.Packed | None:
        """In the layout of the native kernels, for activations that become int8 or stay as they are.

        None for formats, sizes or machines that they do not take.
        """
        floats = activations is None
        if not (floats or activations.name == "int8"):
            return None
        if self._packed is None:
            if (kernel := self.kernel) is None:
                return None
            self._packed = kernel(self.integers(), floats)
            self.codes = self.codes.new_empty(0)
        elif self._packed.floats != floats:
            self._packed = replace(self._packed, floats=floats)  # the same memory
        return self._packed

    @property
    def kernel(self) -> Callable[[Tensor, bool], native.Packed] | None:
        """What packs this format, given one code a number and whether activations are floats."""
        form, element = self.form, self.form.element
        if (
            self.inputs > native.MOST_INPUTS
            or self.codes.device.type != "cpu"
            or not cpu.available()
        ):
            return None
        if element == E2M1 and form.per == "group" and form.group == 32 and form.rule == "power":
            exponents = self.scales.view(torch.uint8)
            return lambda codes, floats: native.pack_mxfp4(codes, exponents, floats)
        if isinstance(element, Integers) and element.unit == 1:
            if form.bits == 8 and form.per == "row":
                return lambda codes, floats: native.pack(codes, self.scales[..., 0], 0, floats)
            if form.bits == 4 and form.per == "group" and form.group % 32 == 0:
                return lambda codes, floats: native.pack(codes, _halved(self.scales), form.group, floats)  # fmt: skip
            if form.bits == 2 and form.per in ("row", "expert") and self._ternary():
                rows = self.scales[..., 0].expand(*self.codes.shape[:-1])
                return lambda codes, floats: native.pack_ternary(codes, rows, floats)
        return None

    def _ternary(self) -> bool:
        """Whether no 2-bit code is -2: folders have no type for ternary numbers, and call them int2."""
        if self.form.element == TERNARY:
            return True
        if self._threefold is None:
            self._threefold = bool((self.integers() > -2).all())
        return self._threefold

    def extra_repr(self) -> str:
        return f"{self.form.name}, {list(self.shape)}"


def rounded(x: Tensor, form: Format | None) -> Tensor:
    """Activations (.., n) rounded with one scale a row; the gradient passes as if they were not."""
    if form is None:
        return x
    near = round_trip(x, form)
    return near + (x - x.detach()) if x.requires_grad else near


class QuantLinear(nn.Linear):
    """x W^T + b with a quantized W; `weight` is W dequantized, made anew whenever asked for."""

    def __init__(self, matrix: Matrix, bias: Tensor | None, activations: Format | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = matrix.inputs, matrix.outputs
        self.matrix, self.activations = matrix, activations
        self.bias = None if bias is None else nn.Parameter(bias.detach())

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.matrix.dense()

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = autocast(x)
        if (weight := self.packed(x)) is not None:
            out = native.linear(x, weight)
        else:
            out = _Product.apply(rounded(x, self.activations), self.matrix)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def packed(self, x: Tensor) -> native.Packed | None:
        """The kernel's weight where the kernel is to be used for `x` (.., in)."""
        rows = x.numel() // max(1, x.shape[-1])
        return self.matrix.packed(self.activations) if _native(x, rows) else None

    def extra_repr(self) -> str:
        acts = self.activations.name if self.activations else "as they come"
        return f"activations {acts}, bias={self.bias is not None}"


class QuantExperts(StepwiseExperts):
    """Routed experts with quantized matrices; only those of chosen experts become numbers."""

    gate_up_proj: Matrix  # pyright: ignore[reportIncompatibleVariableOverride]
    down_proj: Matrix  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, gate_up: Matrix, down: Matrix, activations: Format | None) -> None:
        nn.Module.__init__(self)
        self.gate_up_proj, self.down_proj, self.activations = gate_up, down, activations

    def forward(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """x (N, D); chosen (N, k) int64; gates (N, k) -> (N, D)."""
        if (pair := self.packed(x)) is not None:
            return native.experts(x, chosen, gates, *pair)
        return super().forward(x, chosen, gates)

    def product(self, rows: Tensor, groups: Groups, name: str) -> Tensor:
        return grouped_matmul(rounded(rows, self.activations), groups, getattr(self, name))

    def packed(self, x: Tensor) -> tuple[native.Packed, native.Packed] | None:
        """The kernel's gate-up and down weights where the kernel is to be used for tokens `x`."""
        if not _native(x, x.shape[0]):
            return None
        acts = self.activations
        first, second = self.gate_up_proj.packed(acts), self.down_proj.packed(acts)
        return None if first is None or second is None else (first, second)


def _native(x: Tensor, rows: int) -> bool:
    """Whether the native kernels can compute it, and fast."""
    kinds = (torch.float32, torch.bfloat16)
    fits = rows <= MOST_ROWS and x.dtype in kinds and x.device.type == "cpu"
    return fits and not torch.is_grad_enabled()


def _halved(scales: Tensor) -> Tensor:
    """Scales in float16 where those are the same numbers, as of bfloat16 ones they usually are."""
    wide = scales.float()
    halves = wide.half()
    return halves if torch.equal(halves.float(), wide) else wide


class _Product(torch.autograd.Function):
    """x W^T; W is made again for the backward rather than kept."""

    @staticmethod
    def forward(ctx, x: Tensor, matrix: Matrix) -> Tensor:
        ctx.matrix = matrix
        return F.linear(x, matrix.dense(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad @ ctx.matrix.dense(grad.dtype), None
