"""The quantized weights of a folder: which linears they are, where each part belongs, all of them read.

A linear's matrix is one part. Fused experts, which the model keeps as one matrix for all, are three
parts an expert (gate, up, down), each under the name that the linear of one expert would have.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from herdling.errors import CheckpointError
from herdling.model import weights
from herdling.model.config import ModelConfig
from herdling.model.llama import LanguageModel, build
from herdling.model.sites import Site, sites
from herdling.quant import mx
from herdling.quant.compressed_tensors import (
    Group,
    Groups,
    check_shape,
    group_of,
    parse,
    quantization_config,
)
from herdling.quant.formats import Format
from herdling.quant.modules import Matrix
from herdling.quant.schemes import Scheme
from herdling.quant.swap import matrix_of, place


@dataclass(frozen=True)
class Part:
    """One stored linear."""

    name: str
    """Its module's name in the folder."""
    site: Site
    outputs: int
    inputs: int
    expert: int | None = None
    half: int | None = None
    """Of the outputs of its expert: the first or the second; None: all."""

    @property
    def rows(self) -> slice:
        """Its place among the outputs of the expert's matrix."""
        if self.half is None:
            return slice(None)
        return slice(self.half * self.outputs, (self.half + 1) * self.outputs)


def parts_of(site: Site, shape: tuple[int, ...]) -> list[Part]:
    """The stored linears of a site whose plain weight is (out, in), or (E, in, out)."""
    if site.fused is None:
        outputs, inputs = shape
        return [Part(site.path, site, outputs, inputs)]
    E, inputs, outputs = shape
    found = []
    for expert in range(E):
        for name, (target, half) in weights.PER_EXPERT.items():
            if target != site.fused:
                continue
            width = outputs if half is None else outputs // 2
            stem = f"{site.module}.{expert}.{name}"
            found.append(Part(stem, site, width, inputs, expert, half))
    return found


class Plan:
    """What a folder's `quantization_config` says of a model's weights."""

    def __init__(self, config: ModelConfig, raw: Mapping[str, Any]) -> None:
        """Raises CheckpointError where the experts of a layer differ, ConfigError as `parse` does."""
        groups = parse(raw)
        shapes = weights.shapes(config)
        self.parts: dict[str, tuple[Part, str]] = {}
        """Stored tensor -> the linear it belongs to, and what of it it is."""
        self.groups: dict[str, Group] = {}
        """Parameter -> its group."""
        self._sites: dict[str, Site] = {}
        for site in sites(build(config, device="meta")):
            if site.kind == "router":
                continue
            parts = parts_of(site, shapes[site.parameter])
            group = self._common(site, parts, groups)
            if group is None:
                continue
            self.groups[site.parameter], self._sites[site.parameter] = group, site
            for part in parts:
                for last in group.expected(part.outputs, part.inputs):
                    self.parts[f"{part.name}.{last}"] = part, last

    @staticmethod
    def _common(site: Site, parts: list[Part], groups: Groups) -> Group | None:
        found = [groups.of(part.name) for part in parts]
        if any(group is not found[0] for group in found):
            wrong = next(p.name for p, g in zip(parts, found, strict=True) if g is not found[0])
            raise CheckpointError(
                f"{wrong} is quantized in another way than {parts[0].name}; experts of a layer must "
                "be alike"
            )
        return found[0]

    def check(self, name: str, dtype: str, shape: list[int]) -> str | None:
        """What is wrong with a stored tensor of the plan, or None."""
        part, last = self.parts[name]
        kinds, wanted = self.groups[part.site.parameter].expected(part.outputs, part.inputs)[last]
        if dtype not in kinds:
            return f"is stored as {dtype}; quantization_config needs {' or '.join(kinds)}"
        if shape != wanted:
            return f"has shape {shape}, config and quantization_config need {wanted}"
        return None

    def typed(self, scales: torch.dtype) -> None:
        """Tell the type in which the folder holds float scales."""
        self.groups = {
            name: group
            if group.form.scale_dtype == mx.E8M0
            else replace(group, form=replace(group.form, scale_dtype=scales))
            for name, group in self.groups.items()
        }

    def place(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        device: torch.device | str,
        prefix: str = "",
    ) -> None:
        """Put empty matrices where the folder's are to go; `prefix` leads to a part of the model."""

        def empty(site: Site, weight: Tensor, form: Format) -> Matrix:
            own = self.groups[prefix + site.parameter].form
            return self.matrix(tuple(weight.shape), own, dtype, device)

        for parameter, group in self.groups.items():
            site = self._sites[parameter]
            # The two of experts come together.
            if site.fused == "down_proj" or not parameter.startswith(prefix):
                continue
            names = (site.fused, "down_proj") if site.fused else (None,)
            module = site.module.removeprefix(prefix)
            own = [Site(f"{module}.{n}" if n else module, site.kind, module, n) for n in names]
            scheme = Scheme(group.form.name, group.form, group.activations)
            place(model, scheme, own, empty, check=False)

    @staticmethod
    def matrix(
        shape: tuple[int, ...],
        form: Format,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Matrix:
        """An empty matrix in the place of a plain weight of this shape."""
        if len(shape) == 3:
            E, inputs, outputs = shape
            return Matrix(form, outputs, inputs, E, dtype, device)
        outputs, inputs = shape
        return Matrix(form, outputs, inputs, 0, dtype, device)


def check_stored(
    found: Iterable[Site], scheme: Scheme, config: ModelConfig, dtype: torch.dtype
) -> None:
    """Raise ConfigError where a folder cannot hold these sites in this scheme: before any work."""
    group, shapes = group_of(scheme, dtype), weights.shapes(config)
    for site in found:
        for part in parts_of(site, shapes[site.parameter]):
            check_shape(group, part.name, part.outputs, part.inputs)


class Writing:
    """The tensors of a quantized folder and what its config says of them."""

    def __init__(
        self, add: Callable[[str, Tensor], None], config: ModelConfig, dtype: torch.dtype
    ) -> None:
        """`add` takes a name and a tensor; plain weights and float scales are stored as `dtype`."""
        self._add, self._dtype = add, dtype
        self._named: dict[Group, list[str]] = {}
        self._plain: list[str] = []
        found = sites(build(config, device="meta"))
        self._sites = {site.parameter: site for site in found}
        self._slots: dict[str, list[str]] = {}
        for name, slot in weights.per_expert(config).items():
            self._slots.setdefault(slot.parameter, []).append(name)
        self._all = weights.per_expert(config)

    def matrix(self, site: Site, matrix: Matrix, activations: Format | None) -> None:
        """A quantized weight, one linear after the other. ConfigError where readers cannot take it."""
        group = group_of(Scheme(matrix.form.name, matrix.form, activations), self._dtype)
        for part in parts_of(site, tuple(matrix.shape)):
            check_shape(group, part.name, part.outputs, part.inputs)
            for last, tensor in group.tensors(matrix, part.expert, part.rows).items():
                self._add(f"{part.name}.{last}", tensor)
            self._named.setdefault(group, []).append(part.name)

    def plain(self, name: str, tensor: Tensor) -> None:
        """A weight that stays as it is. Experts are linears here too, for readers expect that."""
        tensor = tensor.to(self._dtype)
        if name in self._slots:
            for stored in self._slots[name]:
                self._add(stored, self._all[stored].view(tensor).contiguous())
                self._plain.append(stored.removesuffix(".weight"))
            return
        self._add(name, tensor)
        if name in self._sites:
            self._plain.append(self._sites[name].path)

    def config(self) -> dict[str, Any]:
        """`quantization_config` of what was written."""
        if len(self._named) == 1:  # all that is not left out
            return quantization_config(list(self._named), self._plain)
        groups = [replace(g, targets=tuple(names)) for g, names in self._named.items()]
        return quantization_config(groups, self._plain)


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, Matrix) for module in model.modules())


def write_model(
    model: LanguageModel,
    config: ModelConfig,
    add: Callable[[str, Tensor], None],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Add every tensor of a quantized model; returns `quantization_config`."""
    writing = Writing(add, config, dtype)
    plain = dict(model.named_parameters())
    found = {site.parameter: site for site in sites(model)}
    for name in weights.shapes(config):
        site = found.get(name)
        matrix = matrix_of(model, site) if site else None
        if site and matrix is not None:
            activations: Any = model.get_submodule(site.module).activations
            writing.matrix(site, matrix, activations)
        elif name in plain:
            writing.plain(name, plain[name].detach())
        else:
            raise CheckpointError(
                f"the model has no tensor {name} for this config; unwrap it first"
            )
    return writing.config()
