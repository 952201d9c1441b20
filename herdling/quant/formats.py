"""Formats of quantized weights: which numbers, and which of them share a scale.

    q = quantize(weight, "int4_g32")                    # groups along the last dimension
    q = quantize(experts, "mxfp4_e2m1", dim=1)          # fused experts [E, in, out]: inputs are dim 1
    q.dequantize(); q.nbytes; q.codes; q.scales; q.packed()

    numbers = element number * scale of its block, rounded once to the nearest

Scales are stored as they are used, codes are made for the stored scale. A block that holds inf or NaN
gets the scale NaN and so decodes to NaN: nothing is hidden. A block of zeros decodes to zeros.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from herdling.errors import ConfigError
from herdling.quant import blocks, elements, mx, packing
from herdling.quant.blocks import Per
from herdling.quant.elements import Element, Rounding

Rule = Literal["most", "mean", "power"]


@dataclass(frozen=True)
class Format:
    """An element, the block that shares a scale, and how the scale follows from the block."""

    name: str
    element: Element
    per: Per = "row"
    """Who shares a scale: the whole tensor, an expert, all inputs of an output, a group of inputs of
    an output, a square of inputs and outputs."""
    group: int = 0
    """Inputs of a group; edge of a square."""
    rule: Rule = "most"
    """`most`: largest magnitude over `divisor`; `mean`: mean magnitude; `power`: as OCP MX."""
    divisor: float = 1.0
    """What the largest magnitude becomes. Integers of b bits: (2^b - 1) / 2 uses every code, and no
    error exceeds half a step; 2^(b-1) - 1 never clips; Meta's int4 takes 8."""
    scale_dtype: torch.dtype = torch.float32
    """Stored type of a scale."""
    mode: mx.Mode = "floor"
    """Of `power`: how its exponent is chosen."""
    rounding: Rounding = "even"
    """Of ties, to even or away from zero."""
    powers_of_two: bool = False
    """Round scales up to powers of two, which makes products with them exact."""
    least: float = 0.0
    """Smallest largest magnitude of a block that is believed (Meta's int4: 1e-6)."""
    bound: float | None = None
    """Largest magnitude that is believed; what is beyond saturates (Meta's FP8 activations: 1200)."""

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.element.bits


OPTIONS = tuple(f.name for f in fields(Format) if f.name not in ("name", "element", "rule"))


def _groups(bits: int, size: int) -> Format:
    return Format(
        f"int{bits}_g{size}", elements.integers(bits), "group", size, divisor=(2**bits - 1) / 2,
        scale_dtype=torch.bfloat16,
    )  # fmt: skip


def _mx(name: str, element: Element) -> Format:
    return Format(name, element, "group", mx.BLOCK, "power", scale_dtype=mx.E8M0)


FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format("int8", elements.integers(8), divisor=127.5),
        _groups(4, 32),
        _groups(4, 128),
        _groups(3, 32),
        _groups(2, 32),
        Format("nf4", elements.NF4, "group", 64),
        Format("ternary", elements.TERNARY, "expert", rule="mean"),
        Format("fp8_e4m3", elements.E4M3, divisor=elements.E4M3.top),
        Format("fp8_e5m2", elements.E5M2, divisor=elements.E5M2.top),
        _mx("mxfp8_e4m3", elements.E4M3),
        _mx("mxfp8_e5m2", elements.E5M2),
        _mx("mxfp6_e2m3", elements.E2M3),
        _mx("mxfp6_e3m2", elements.E3M2),
        _mx("mxfp4_e2m1", elements.E2M1),
        _mx("mxint8", elements.MXINT8),
    )
}


def format_of(name: str, **options: Any) -> Format:
    """A format by name, with options of `Format` changed; ConfigError for what does not exist."""
    if name not in FORMATS:
        raise ConfigError(f"no format {name!r}; there are: {', '.join(FORMATS)}")
    return changed(FORMATS[name], **options)


def changed(form: Format, **options: Any) -> Format:
    """The format with some options set; ConfigError for an unknown one."""
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ConfigError(f"no option {unknown[0]!r} of a format; there are: {', '.join(OPTIONS)}")
    form = replace(form, **options)
    if form.per in ("group", "square") and form.group < 1:
        raise ConfigError(f"{form.name}: group {form.group} with per={form.per!r}; say group=128")
    return form


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor as codes and scales."""

    form: Format
    codes: Tensor
    """One code a number in the tensor's own shape: int8 for integers, else uint8 bit patterns."""
    scales: Tensor
    """In the tensor's shape with each dimension counted in blocks."""
    dim: int
    """Along which inputs run."""
    dtype: torch.dtype
    """Of the tensor it was made of."""

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """What codes of exactly `bits` bits and the scales take."""
        length = packing.packed_length(self.shape[self.dim], self.form.bits)
        rows = self.codes.numel() // max(1, self.shape[self.dim])
        return rows * length + self.scales.nbytes

    def packed(self) -> Tensor:
        """uint8: codes as a dense stream of bits along `dim` (`packing`)."""
        return packing.pack(self.codes, self.form.bits, self.dim)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers that codes and scales stand for, by default in the type they came from."""
        return decode(self.codes, self.scales, self.form, self.dim).to(dtype or self.dtype)


def quantize(tensor: Tensor, name: str | Format, dim: int = -1, **options: Any) -> Quantized:
    """The tensor in a format (one of `FORMATS`, changed by `options`), inputs along `dim`."""
    form = name if isinstance(name, Format) else format_of(name, **options)
    values, scales = _snap(tensor, form, dim)
    codes = form.element.encode(values.nan_to_num_(0.0))
    shape = tuple(tensor.shape)
    counts = scales.shape[::2]
    return Quantized(
        form, blocks.join(codes, shape), scales.reshape(counts), dim % tensor.dim(), tensor.dtype
    )


def round_trip(tensor: Tensor, name: str | Format, dim: int = -1, **options: Any) -> Tensor:
    """`quantize(...).dequantize()`, the same bits, without making codes."""
    form = name if isinstance(name, Format) else format_of(name, **options)
    values, scales = _snap(tensor, form, dim)
    return blocks.join(values.mul_(wide(scales)), tuple(tensor.shape)).to(tensor.dtype)


def in_range(tensor: Tensor, form: Format, dim: int = -1) -> Tensor:
    """Where rounding is all that a format does to a tensor: false where its range cuts a number off."""
    block = blocks.block_shape(tuple(tensor.shape), dim, form.per, form.group)
    tiles = blocks.split(tensor.detach().float(), block)
    scaled = tiles / wide(_scales(tiles, form, tensor, block))
    element, step = form.element, 0.0
    low, high = -element.top, element.top
    if isinstance(element, elements.Integers):
        # Half a step beyond the last number is rounding too; the largest is just there, or a bit beyond.
        low, step = element.low * element.unit, element.unit / 2 + 1e-6 * element.top
    return blocks.join((scaled >= low - step) & (scaled <= high + step), tuple(tensor.shape))


def decode(codes: Tensor, scales: Tensor, form: Format, dim: int) -> Tensor:
    """Codes and scales, both as `Quantized` has them -> float32."""
    tiles = blocks.split(codes, blocks.block_shape(tuple(codes.shape), dim, form.per, form.group))
    spread = scales.reshape([n for count in scales.shape for n in (count, 1)])
    return blocks.join(form.element.decode(tiles).mul_(wide(spread)), tuple(codes.shape))


def wide(scales: Tensor) -> Tensor:
    """Stored scales as float32."""
    return mx.powers(scales) if scales.dtype == mx.E8M0 else scales.float()


def _snap(tensor: Tensor, form: Format, dim: int) -> tuple[Tensor, Tensor]:
    """Numbers of the element (float32) and stored scales, both as blocks."""
    block = blocks.block_shape(tuple(tensor.shape), dim, form.per, form.group)
    tiles = blocks.split(tensor.detach().float(), block)
    scales = _scales(tiles, form, tensor, block)
    # Times the reciprocal, as torchao and the kernels have it; of powers of two it may not be a float.
    scaled = tiles / wide(scales) if form.rule == "power" else tiles * (1 / scales.float())
    return form.element.snap(scaled, form.rounding), scales


def _scales(tiles: Tensor, form: Format, tensor: Tensor, block: tuple[int, ...]) -> Tensor:
    within = blocks.sizes_of(tiles)
    if form.rule == "mean":
        padded = tiles.numel() != tensor.numel()
        scale = tiles.abs().mean(within, keepdim=True)
        if padded:
            ones = blocks.split(torch.ones_like(tensor, dtype=torch.float32), block)
            scale = scale / ones.mean(within, keepdim=True)
    else:
        low, high = tiles.amin(within, keepdim=True), tiles.amax(within, keepdim=True)
        most = torch.maximum(high, -low)  # without a copy of all magnitudes
        if form.bound is not None:
            most = torch.where(most.isfinite(), most.clamp(max=form.bound), most)
        if form.rule == "power":
            return mx.scales(most, form.element, form.mode)  # pyright: ignore[reportArgumentType]
        scale = most.clamp(min=form.least) / form.divisor
    if form.powers_of_two:
        part, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (part == 0.5).int())
    stored = scale.to(form.scale_dtype)
    # Zeros, and what is too small for a scale to tell from them, need some divisor.
    stored = stored.masked_fill(stored.float() < 2.0**-126, 1)
    return stored.masked_fill(~scale.isfinite(), torch.nan)
