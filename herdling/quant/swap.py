"""A model's linears and experts made low precision in place, from outside, and what that covered.

    report = swap(model, scheme("w4a8"))                     # the scheme's kinds
    report = swap(model, scheme("int8"), ("experts", "*.layers.0.*"))
    print(report)

Weights are rounded to the nearest, layer by layer, and the plain ones freed one by one. `place` puts in
empty matrices instead, for a folder to fill.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from herdling.errors import ConfigError
from herdling.model.llama import Experts, LanguageModel
from herdling.model.sites import KINDS, Site, kind_of, select, sites
from herdling.quant import mx
from herdling.quant.formats import Format
from herdling.quant.modules import Matrix, QuantExperts, QuantLinear
from herdling.quant.schemes import Scheme

Fill = Callable[[Site, Tensor, Format], Matrix]
"""(site, plain weight, format) -> its matrix."""


def chosen(model: LanguageModel, scheme: Scheme, targets: Sequence[str] = ()) -> list[Site]:
    """The sites that a scheme, or `targets` in the place of its kinds, quantizes.

    Raises ConfigError where one matches nothing, where nothing is left, and for a router, whose choice
    rests on small differences.
    """
    if targets:
        found = select(model, targets, "quantize")
    else:
        found = [site for site in sites(model) if site.kind in scheme.kinds]
    if scheme.skip_ends:
        last = model.config.text.num_hidden_layers - 1
        ends = [f".layers.{i}." for i in (0, last)]
        found = [s for s in found if not (s.kind in _DECODER and any(e in s.path for e in ends))]
    if not found:
        ends = " beside the first and the last layer" if scheme.skip_ends else ""
        wanted = ", ".join(targets or scheme.kinds)
        raise ConfigError(f"quantize: the model has no {wanted}{ends}; nothing would be quantized")
    if routers := [site.path for site in found if site.kind == "router"]:
        raise ConfigError(f"quantize: {routers[0]} is a router and stays as it is; leave it out")
    return found


_DECODER = ("attention", "shared", "experts", "dense", "router")


def swap(
    model: LanguageModel, scheme: Scheme, targets: Sequence[str] = (), fill: Fill | None = None
) -> "Report":
    """Quantize the chosen sites in place; returns the coverage of the whole model.

    `fill` makes a site's matrix from its weight, by default rounding to the nearest. Raises ConfigError
    as `chosen` does, for a site with an adapter on it, and for weights that are not finite.
    """
    fill = fill or (lambda site, weight, form: Matrix.of(weight, form))
    place(model, scheme, chosen(model, scheme, targets), fill)
    return Report(rows_of(model, scheme))


def fitted(form: Format, dtype: torch.dtype) -> Format:
    """The format with scales of the model's type where that has 16 bits, as folders have them."""
    if form.scale_dtype == mx.E8M0 or dtype == torch.float32:
        return form
    return replace(form, scale_dtype=dtype)


@torch.no_grad()
def place(
    model: nn.Module, scheme: Scheme, found: Sequence[Site], fill: Fill, *, check: bool = True
) -> None:
    """Put quantized modules in the place of the plain ones that hold `found`.

    Without `check` matrices may still be empty. Raises ConfigError as `swap` does.
    """
    whole = Counter(site.module for site in found)
    for site in found:
        module = model.get_submodule(site.module)
        if type(module) not in (nn.Linear, Experts):
            raise ConfigError(
                f"quantize: {site.module} is a {type(module).__name__}, not a plain weight; "
                "merge or remove adapters first"
            )
        if site.fused and whole[site.module] != 2:
            raise ConfigError(f"quantize: of {site.module} both matrices or none; name both")
    for site in found:
        module = model.get_submodule(site.module)
        if isinstance(module, QuantExperts):  # with its first matrix
            continue
        names = ("gate_up_proj", "down_proj") if site.fused else ("weight",)
        made = []
        for name in names:
            weight = getattr(module, name)
            own = replace(site, path=f"{site.module}.{name}", fused=name) if site.fused else site
            matrix = fill(own, weight, fitted(scheme.weights, weight.dtype))
            if check and not _finite(matrix):
                raise ConfigError(
                    f"quantize: {own.parameter} holds inf or NaN; remedy: repair the weights"
                )
            made.append(matrix)
            delattr(module, name)  # the plain weight is freed before the next is rounded
        if site.fused:
            new: nn.Module = QuantExperts(made[0], made[1], scheme.activations)
        else:
            new = QuantLinear(made[0], module.bias, scheme.activations)  # pyright: ignore[reportArgumentType]
        parent, _, leaf = site.module.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.train(module.training))


@torch.no_grad()
def restore(model: nn.Module) -> None:
    """Plain modules again, in place and one by one, with the numbers that the codes stand for."""
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            new: nn.Module = nn.Linear(1, 1, bias=module.bias is not None)
            new.in_features, new.out_features = module.in_features, module.out_features
            new.weight = nn.Parameter(module.matrix.dense())
            if module.bias is not None:
                new.bias = module.bias
        elif isinstance(module, QuantExperts):
            new = Experts.__new__(Experts)
            nn.Module.__init__(new)
            for name in ("gate_up_proj", "down_proj"):
                dense = getattr(module, name).dense().mT.contiguous()
                setattr(new, name, nn.Parameter(dense))
        else:
            continue
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.train(module.training))


def _finite(matrix: Matrix) -> bool:
    return bool(matrix.scales.float().isfinite().all())


def matrix_of(model: nn.Module, site: Site) -> Matrix | None:
    """The quantized matrix of a site; None where its weight is plain."""
    module = model.get_submodule(site.module)
    found = getattr(module, site.fused) if site.fused else getattr(module, "matrix", None)
    return found if isinstance(found, Matrix) else None


@dataclass(frozen=True)
class Row:
    """The parameters of one kind that are of one type."""

    kind: str
    format: str
    """A format, or the plain type."""
    parameters: int
    nbytes: int
    why: str
    """Why they are not quantized; empty where they are."""


def rows_of(model: LanguageModel, scheme: Scheme | None = None) -> list[Row]:
    """What each kind of a model's weights is made of."""
    sums: dict[tuple[str, str, str], list[int]] = {}

    def add(name: str, form: str, why: str, parameters: int, nbytes: int) -> None:
        both = sums.setdefault((kind_of(name), form, why), [0, 0])
        both[0] += parameters
        both[1] += nbytes

    for name, module in model.named_modules():
        if isinstance(module, Matrix):
            add(name, module.form.name, "", module.shape.numel(), module.nbytes)
    for name, parameter in model.named_parameters():
        kind = str(parameter.dtype).removeprefix("torch.")
        add(name, kind, _why(name, parameter, scheme), parameter.numel(), parameter.nbytes)
    order = (*KINDS, "other")
    rows = [Row(kind, form, n, size, why) for (kind, form, why), (n, size) in sums.items()]
    return sorted(rows, key=lambda row: (order.index(row.kind), bool(row.why)))


def size_of(model: LanguageModel) -> tuple[int, int]:
    """Parameters and bytes of all weights, quantized ones included."""
    rows = rows_of(model)
    return sum(row.parameters for row in rows), sum(row.nbytes for row in rows)


def main_format(model: LanguageModel) -> str:
    """The format, or plain type, of most parameters."""
    counts: Counter[str] = Counter()
    for row in rows_of(model):
        counts[row.format] += row.parameters
    return counts.most_common(1)[0][0]


def _why(name: str, parameter: Tensor, scheme: Scheme | None) -> str:
    kind = kind_of(name)
    if parameter.dim() < 2:
        return "vectors"
    if kind == "other":
        return "looked up, not multiplied" if "embed" in name else "no product"
    if kind == "router":
        return "its choice rests on small differences"
    if scheme is not None and kind in scheme.kinds and scheme.skip_ends:
        return "first and last layer"
    return "not asked for"


@dataclass(frozen=True)
class Report:
    """How much of a model is quantized, and to what; `str` is the table."""

    rows: list[Row]

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)

    @property
    def share(self) -> float:
        """Quantized parameters over all."""
        done = sum(row.parameters for row in self.rows if not row.why)
        return done / sum(row.parameters for row in self.rows)

    def __str__(self) -> str:
        total, count = self.nbytes, sum(row.parameters for row in self.rows)
        lines = [f"{'kind':<10} {'format':<11} {'parameters':>15} {'bytes':>15} {'share':>6}  why"]
        for row in self.rows:
            lines.append(
                f"{row.kind:<10} {row.format:<11} {row.parameters:>15,} {row.nbytes:>15,} "
                f"{row.nbytes / total:>6.1%}  {row.why}".rstrip()
            )
        by_format: Counter[str] = Counter()
        for row in self.rows:
            by_format[row.format] += row.nbytes
        shares = ", ".join(f"{form} {size / total:.1%}" for form, size in by_format.most_common())
        lines.append(
            f"{self.share:.1%} of {count:,} parameters are quantized; {total:,} bytes ({shares}), "
            f"{8 * total / count:.2f} bits a parameter"
        )
        experts = [row for row in self.rows if row.kind == "experts"]
        if experts and all(row.why for row in experts):
            size = sum(row.parameters for row in experts)
            lines.append(
                f"warning: the experts, {size / count:.0%} of the model, are not quantized"
            )
        return "\n".join(lines)
