"""How much of a model an adapter reaches and trains, by kind: nothing is left out in silence."""

from dataclasses import dataclass

from torch import nn

from herdling.lora.adapters import of
from herdling.model.sites import KINDS, kind_of, shape_of, sites


@dataclass(frozen=True)
class Row:
    """One kind of matrices."""

    kind: str
    parameters: int
    """Of the model itself."""
    matrices: int
    """A fused tensor counts each expert's."""
    adapted: int
    """Matrices that an adapter reaches."""
    trainable: int
    """Parameters that training moves: of adapters, and of the model where it is not frozen."""


def coverage(model: nn.Module) -> list[Row]:
    """A row for each kind that the model has; `other` are embeddings and norms."""
    adapters = of(model)
    reached = {path for name in adapters.names for path in adapters.factors(name)}
    sizes: dict[str, int] = dict.fromkeys((*KINDS, "other"), 0)
    trainable = dict(sizes)
    plain = dict(model.named_parameters())
    for name, parameter in plain.items():
        kind = kind_of(name)
        if ".lora." not in name:
            sizes[kind] += parameter.numel()
        if parameter.requires_grad:
            trainable[kind] += parameter.numel()
    counts, hits = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 0)
    for site in sites(model):
        shape = shape_of(model, site)
        if site.parameter not in plain:  # kept as codes
            sizes[site.kind] += shape.numel()
        size = shape[0] if site.fused else 1
        counts[site.kind] += size
        hits[site.kind] += size * (site.path in reached)
    return [Row(k, sizes[k], counts[k], hits[k], trainable[k]) for k in sizes if sizes[k]]


def table(model: nn.Module) -> str:
    """`coverage` as text, with a line of warning where there are experts and none is reached."""
    rows = coverage(model)
    lines = [f"{'kind':<10} {'matrices':>9} {'adapted':>9} {'parameters':>14} {'trainable':>12}"]
    for row in rows:
        lines.append(
            f"{row.kind:<10} {row.matrices:>9,} {row.adapted:>9,} {row.parameters:>14,} "
            f"{row.trainable:>12,}"
        )
    size, trainable = sum(r.parameters for r in rows), sum(r.trainable for r in rows)
    lines.append(f"trainable: {trainable:,} beside {size:,}, {trainable / size:.2%}")
    experts = next((row for row in rows if row.kind == "experts"), None)
    if experts and not experts.adapted:
        lines.append(
            f"warning: the experts, {experts.parameters / size:.0%} of the model, are not adapted; "
            "remedy: add experts to the targets"
        )
    return "\n".join(lines)
