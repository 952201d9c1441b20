"""Weights as compressed-tensors folders hold them: the config that explains them, and the exact bits.

    group = group_of(scheme, torch.bfloat16)       # to write; raises where the layout has no such format
    group.tensors(matrix)                          # {"weight_packed": ..., "weight_scale": ..., ...}
    quantization_config([group], ignore)           # what config.json says
    parse(raw)                                     # and back: groups and what they leave out

Each linear, each expert's too, is stored by itself, outputs by inputs. Layouts: pack-quantized (integers
below 8 bits and weight-only int8, as offset bit streams in int32), int-quantized (int8 with int8
activations), float-quantized (FP8), mxfp4-, mxfp6-pack-quantized, mxfp8-quantized. Scales are those of
rows, groups or squares; one for a whole tensor or expert is repeated for its rows. Not read: zero
points, activations with static scales, NVFP4, sparse layouts.
Source: compressed-tensors 0.20 (`compressors/`, `quantization/quant_args.py`).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from herdling.errors import ConfigError
from herdling.quant import elements, mx, packing
from herdling.quant.elements import E2M1, E2M3, E4M3, MXINT8, Integers
from herdling.quant.formats import FORMATS, Format, format_of, wide
from herdling.quant.modules import Matrix
from herdling.quant.schemes import Scheme

_MX = {E2M1: "mxfp4-pack-quantized", E2M3: "mxfp6-pack-quantized", E4M3: "mxfp8-quantized"}
_MX_FORMATS = {4: "mxfp4_e2m1", 6: "mxfp6_e2m3", 8: "mxfp8_e4m3"}
FLOATS = ("F32", "BF16", "F16")
"""Types of scales, as safetensors names them."""
_INT8, _FP8 = format_of("int8", divisor=127.0), format_of("fp8_e4m3")


@dataclass(frozen=True)
class Group:
    """Weights of one format, as a folder has them."""

    form: Format
    """Of rows, groups or squares."""
    layout: str
    activations: Format | None = None
    targets: tuple[str, ...] = ("Linear",)
    """Class names, module names, or "re:" and a pattern."""

    def expected(self, outputs: int, inputs: int) -> dict[str, tuple[tuple[str, ...], list[int]]]:
        """Each tensor of a linear, by its last name: types it may have (safetensors' names), shape."""
        per, size = self.form.per, self.form.group
        if per == "group":
            counts = [outputs, -(-inputs // size)]
        else:
            counts = [outputs, 1] if per == "row" else [-(-outputs // size), -(-inputs // size)]
        scale = ("U8", "F8_E8M0") if self.form.scale_dtype == mx.E8M0 else FLOATS
        length = packing.packed_length(inputs, self.form.bits)
        code: dict[str, tuple[tuple[str, ...], list[int]]]
        if self.layout == "pack-quantized":
            words = -(-inputs * self.form.bits // 32)
            code = {
                "weight_packed": (("I32",), [outputs, words]),
                "weight_shape": (("I64", "I32"), [2]),
            }
        elif self.layout.endswith("-pack-quantized"):
            code = {"weight_packed": (("U8",), [outputs, length])}
        else:
            kind = "I8" if isinstance(self.form.element, Integers) else "F8_E4M3"
            code = {"weight": ((kind,), [outputs, inputs])}
        return {**code, "weight_scale": (scale, counts)}

    def tensors(
        self, matrix: Matrix, expert: int | None = None, rows: slice = slice(None)
    ) -> dict[str, Tensor]:
        """What a folder holds of a matrix: of one expert, of some of its rows."""
        codes, scales = matrix.stored(expert)[rows], matrix.scales
        if expert is not None:
            scales = scales[expert]
        if matrix.form.per in ("tensor", "expert"):
            scales = scales.expand(matrix.outputs, 1)
        size = matrix.form.group if matrix.form.per == "square" else 1
        scales = scales[_blocks(rows, size)]
        if matrix.form.element == MXINT8:
            scales = wide(scales) * MXINT8.unit
        scales = scales.view(torch.uint8) if scales.dtype == mx.E8M0 else scales.to(self.form.scale_dtype)  # fmt: skip
        if self.layout == "pack-quantized":
            if self.form.bits == 8:
                codes = codes ^ 128  # offset rather than two's complement
            words = -(-matrix.inputs * self.form.bits // 32)
            codes = torch.nn.functional.pad(codes, (0, words * 4 - codes.shape[-1]))
            shape = torch.tensor([codes.shape[0], matrix.inputs])
            return {
                "weight_packed": codes.contiguous().view(torch.int32),
                "weight_scale": scales.contiguous(),
                "weight_shape": shape,
            }
        if self.layout.endswith("-pack-quantized"):
            return {"weight_packed": codes.contiguous(), "weight_scale": scales.contiguous()}
        kind = torch.int8 if isinstance(self.form.element, Integers) else torch.float8_e4m3fn
        return {"weight": codes.contiguous().view(kind), "weight_scale": scales.contiguous()}

    @torch.no_grad()
    def take(
        self,
        matrix: Matrix,
        tensors: Mapping[str, Tensor],
        expert: int | None = None,
        rows: slice = slice(None),
    ) -> None:
        """Put what a folder holds into a matrix of this group's format."""
        matrix.restore()
        codes, scales = matrix.codes, matrix.scales
        if expert is not None:
            codes, scales = codes[expert], scales[expert]
        target = codes[rows]
        code = tensors["weight_packed"] if "weight_packed" in tensors else tensors["weight"]
        stored = code.contiguous().view(torch.uint8)[:, : target.shape[-1]]
        if self.layout == "pack-quantized" and self.form.bits == 8:
            stored = stored ^ 128
        target.copy_(stored)
        size = self.form.group if self.form.per == "square" else 1
        part, scale = scales[_blocks(rows, size)], tensors["weight_scale"]
        if part.dtype == mx.E8M0:
            part.view(torch.uint8).copy_(scale.view(torch.uint8))
        else:
            part.copy_(scale)

    def config(self) -> dict[str, Any]:
        """This group in `quantization_config`."""
        form = self.form
        weights: dict[str, Any] = {
            "num_bits": form.bits,
            "type": "int" if isinstance(form.element, Integers) else "float",
            "symmetric": True,
            "dynamic": False,
            "strategy": {"row": "channel", "square": "block"}.get(form.per, "group"),
        }
        if form.per == "group":
            weights["group_size"] = form.group
        if form.per == "square":
            weights["block_structure"] = [form.group, form.group]
        if form.scale_dtype == mx.E8M0:
            weights["scale_dtype"] = "torch.uint8"
        acts = None
        if self.activations is not None:
            acts = {
                "num_bits": 8,
                "type": "int" if isinstance(self.activations.element, Integers) else "float",
                "symmetric": True,
                "dynamic": True,
                "strategy": "token",
            }
        return {
            "targets": list(self.targets),
            "weights": weights,
            "input_activations": acts,
            "output_activations": None,
            "format": self.layout,
        }


def _blocks(rows: slice, size: int) -> slice:
    """Rows as blocks of rows."""
    if size == 1 or rows == slice(None):
        return rows
    if rows.start % size or rows.stop % size:
        raise ConfigError(
            f"squares of {size} outputs do not divide {rows.stop - rows.start} of an expert; "
            "remedy: one scale a row"
        )
    return slice(rows.start // size, rows.stop // size)


def group_of(scheme: Scheme, dtype: torch.dtype, targets: Sequence[str] = ("Linear",)) -> Group:
    """How a folder of this type holds what a scheme quantizes; ConfigError where it cannot."""
    form, activations = scheme.weights, scheme.activations
    element = form.element
    per = "row" if form.per in ("tensor", "expert") else form.per
    # Readers compute in the type of the scale, so that is the model's.
    stored = replace(form, per=per, scale_dtype=mx.E8M0 if form.scale_dtype == mx.E8M0 else dtype)
    if element == MXINT8:
        stored = replace(stored, name=f"int8_g{form.group}", element=elements.integers(8),
                         rule="most", scale_dtype=dtype)  # fmt: skip
    if element == elements.TERNARY:
        stored = replace(stored, name="int2", element=elements.integers(2), rule="most")
    if element in _MX and form.rule == "power":
        if (per, form.group) != ("group", mx.BLOCK):
            raise ConfigError(
                f"compressed-tensors folders hold {form.name} in groups of {mx.BLOCK} alone, not "
                f"{f'of {form.group}' if per == 'group' else f'with a scale a {per}'}; "
                f"remedy: group {mx.BLOCK}"
            )
        layout = _MX[element]  # pyright: ignore[reportArgumentType]
    elif isinstance(stored.element, Integers):
        whole = stored.bits == 8 and stored.per == "row" and activations is not None
        layout = "int-quantized" if whole else "pack-quantized"
    elif element == E4M3 and form.rule == "most" and form.per != "group":
        layout = "float-quantized"
    else:
        raise ConfigError(
            f"compressed-tensors folders have no layout for {form.name}; remedy: int8, int4_g32, "
            "int4_g128, int3_g32, int2_g32, fp8_e4m3, mxfp8_e4m3, mxfp6_e2m3, mxfp4_e2m1, mxint8 or "
            "ternary, or in memory alone by herdling.load(..., quantize=)"
        )
    return Group(stored, layout, activations, tuple(targets))


def check_shape(group: Group, name: str, outputs: int, inputs: int) -> None:
    """Raise ConfigError for a matrix that other readers could not take in this format."""
    size = group.form.group
    if group.form.per == "group" and inputs % size:
        fits = [n for n in (16, 32, 64, 128) if inputs % n == 0]
        remedy = f"--group {max(fits)} or int8" if fits else "int8"
        raise ConfigError(
            f"{name}: groups of {size} do not divide its {inputs} inputs, which other readers do not "
            f"take; remedy: {remedy}"
        )


def quantization_config(groups: Sequence[Group], ignore: Iterable[str]) -> dict[str, Any]:
    """What config.json says of quantized weights; `ignore` are linears that are not."""
    layouts = {group.layout for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group.config() for i, group in enumerate(groups)},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


@dataclass(frozen=True)
class Groups:
    """A parsed `quantization_config`."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]

    def of(self, name: str) -> Group | None:
        """The group of a linear by its module name; None for one that is not quantized."""
        if any(_matches(name, pattern) for pattern in self.ignore):
            return None
        found = (g for g in self.groups if any(_matches(name, target) for target in g.targets))
        return next(found, None)


def _matches(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target in ("Linear", name)


def parse(raw: Mapping[str, Any]) -> Groups:
    """Read a `quantization_config`; ConfigError for what is not supported, by its name."""
    method = raw.get("quant_method")
    if method != "compressed-tensors":
        raise ConfigError(
            f"quantization_config: quant_method is {method!r}; only compressed-tensors folders can "
            "be opened, use the unquantized model"
        )
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if raw.get(key):
            raise ConfigError(f"quantization_config: {key} is not supported")
    if raw.get("quantization_status") not in ("compressed", None):
        raise ConfigError(
            f"quantization_config: quantization_status is {raw['quantization_status']!r}; only "
            "compressed weights can be opened"
        )
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ConfigError("quantization_config: has no config_groups")
    found = tuple(_parse_group(name, g, raw.get("format")) for name, g in groups.items())
    return Groups(found, _names("quantization_config.ignore", raw.get("ignore")))


def _names(where: str, raw: Any) -> tuple[str, ...]:
    names = raw or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{where} is {raw!r}; it must be a list of names")
    return tuple(names)


def _parse_group(name: str, raw: Any, common: str | None) -> Group:
    where = f"quantization_config.config_groups.{name}"
    if not isinstance(raw, dict) or not isinstance(raw.get("weights"), dict):
        raise ConfigError(f"{where}: must be an object that has weights")
    if raw.get("output_activations"):
        raise ConfigError(f"{where}: output_activations are not supported")
    form = _parse_weights(where, raw["weights"])
    layout = raw.get("format") or common
    known = _layouts(form)
    if layout not in known:
        raise ConfigError(
            f"{where}: format {layout!r} of {form.name} weights is not supported; {' or '.join(known)} is"
        )
    acts = raw.get("input_activations")
    return Group(
        form,
        layout,
        _parse_activations(where, acts),
        _names(f"{where}.targets", raw.get("targets")),
    )


def _layouts(form: Format) -> tuple[str, ...]:
    if form.scale_dtype == mx.E8M0:
        return (_MX[form.element],)  # pyright: ignore[reportArgumentType]
    if isinstance(form.element, Integers):
        plain = ("int-quantized", "naive-quantized") if form.bits == 8 else ()
        return ("pack-quantized", *plain)
    return ("float-quantized", "naive-quantized")


def _parse_weights(where: str, raw: Mapping[str, Any]) -> Format:
    for name in ("num_bits", "group_size"):
        if not isinstance(raw.get(name), int | None):
            raise ConfigError(
                f"{where}.weights: {name} is {raw[name]!r}; it must be a whole number"
            )
    bits, kind = raw.get("num_bits") or 8, raw.get("type", "int")
    strategy, size = raw.get("strategy"), raw.get("group_size")
    if raw.get("symmetric") is False:
        raise ConfigError(f"{where}: weights with zero points (symmetric false) are not supported")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if kind == "float" and strategy == "group" and size == mx.BLOCK and bits in _MX_FORMATS:
        return FORMATS[_MX_FORMATS[bits]]
    per: Any = {"channel": "row", "group": "group", "block": "square"}.get(strategy)
    if per == "square":
        edges = raw.get("block_structure") or [0, 0]
        edges = [int(n) for n in edges.split("x")] if isinstance(edges, str) else edges
        if len(set(edges)) != 1:
            raise ConfigError(f"{where}: blocks of {edges} are not supported; squares are")
        size = edges[0]
    if per in ("group", "square") and not (isinstance(size, int) and size > 0):
        raise ConfigError(
            f"{where}.weights: strategy {strategy} with groups of {size}; they must be 1 or more"
        )
    integers = kind == "int" and bits in packing.WIDTHS
    if per is None or not (integers or (kind == "float" and bits == 8 and per != "group")):
        raise ConfigError(
            f"{where}: weights of {bits} bits, type {kind}, strategy {strategy}, group {size} are not "
            "supported"
        )
    if kind == "float":
        return replace(_FP8, per=per, group=size or 0)
    name = f"int{bits}" if per == "row" else f"int{bits}_g{size}"
    return Format(name, elements.integers(bits), per, size or 0, divisor=(2**bits - 1) / 2)


def _parse_activations(where: str, raw: Mapping[str, Any] | None) -> Format | None:
    if raw is None:
        return None
    told = raw.get("num_bits"), raw.get("strategy"), raw.get("dynamic"), raw.get("symmetric", True)
    if told != (8, "token", True, True):
        raise ConfigError(
            f"{where}: input_activations of {told[0]} bits, strategy {told[1]}, dynamic {told[2]}, "
            f"symmetric {told[3]} are not supported; 8 bits with one dynamic scale a token are"
        )
    return _FP8 if raw.get("type") == "float" else _INT8
