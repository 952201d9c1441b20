"""The matrices of a model that adapters and formats may change, by kind, and how they are chosen.

    select(model, ("attention", "experts"))     # kinds
    select(model, ("*.layers.0.*",))            # patterns over names, the router only if they name it

Embeddings and norms are no matrices of a product and cannot be chosen.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from herdling.errors import ConfigError
from herdling.model.llama import Experts

KINDS: tuple[str, ...] = (
    "attention",
    "shared",
    "experts",
    "dense",
    "router",
    "head",
    "vision",
    "projector",
)
ALL = "all"


@dataclass(frozen=True)
class Site:
    """One matrix, or the matrices of all experts of a layer in one fused tensor."""

    path: str
    """Name of the linear, or of the fused tensor."""
    kind: str
    module: str
    """Name of the module that holds it: `path` itself for a linear."""
    fused: str | None = None
    """For experts: the parameter's name within the module."""

    @property
    def parameter(self) -> str:
        """Name of the base weight."""
        return self.path if self.fused else f"{self.path}.weight"


def weight_of(model: nn.Module, site: Site) -> nn.Parameter:
    """The base weight of a site, whatever adapters lie over it."""
    own = dict(model.get_submodule(site.module).named_parameters(recurse=False))
    return own[site.fused or "weight"]


def shape_of(model: nn.Module, site: Site) -> torch.Size:
    """(out, in) of a linear, (E, in, out) of experts, whatever the weight is kept as."""
    module = model.get_submodule(site.module)
    if site.fused:
        return getattr(module, site.fused).shape
    assert isinstance(module, nn.Linear)
    return torch.Size((module.out_features, module.in_features))


def home_of(model: nn.Module, site: Site) -> tuple[torch.device, torch.dtype]:
    """Where a site's weight lies and its type: float32 where it is kept as codes."""
    module = model.get_submodule(site.module)
    stored = [*module.parameters(recurse=False), *module.buffers()]
    own = dict(module.named_parameters(recurse=False)).get(site.fused or "weight")
    if own is None or not own.is_floating_point():
        return stored[0].device, torch.float32
    return own.device, own.dtype


def sites(model: nn.Module) -> list[Site]:
    """Every site, in the model's order."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            names = ("gate_up_proj", "down_proj")
            found += [Site(f"{path}.{name}", "experts", path, name) for name in names]
        elif isinstance(module, nn.Linear):
            found.append(Site(path, kind_of(path), path))
    return found


def kind_of(name: str) -> str:
    """The kind of a parameter or module by its name; `other` for embeddings and norms."""
    dotted = f".{name}."
    for part, kind in _PARTS:
        if part in dotted:
            return kind
    return "other"


_PARTS = (
    (".vision_model.", "vision"),
    (".multi_modal_projector.", "projector"),
    (".lm_head.", "head"),
    (".self_attn.", "attention"),
    (".shared_expert.", "shared"),
    (".router.", "router"),
    (".experts.", "experts"),
    (".feed_forward.", "dense"),
)


def select(model: nn.Module, targets: Sequence[str], who: str = "lora") -> list[Site]:
    """The sites that kinds or patterns name; ConfigError, told by `who`, for one that matches nothing."""
    known = sites(model)
    chosen: set[Site] = set()
    for target in targets:
        matched = [site for site in known if _matches(site, target)]
        if not matched:
            raise ConfigError(
                f"{who} target {target!r} matches nothing; {_existing(known, target)}"
            )
        chosen.update(matched)
    return [site for site in known if site in chosen]


def _matches(site: Site, target: str) -> bool:
    if target in KINDS:
        return site.kind == target
    asked = site.kind != "router" or "router" in target
    return asked and (target == ALL or fnmatchcase(site.path, target))


def _existing(known: Sequence[Site], target: str) -> str:
    counts = {kind: sum(site.kind == kind for site in known) for kind in KINDS}
    there = ", ".join(f"{kind} ({count})" for kind, count in counts.items() if count)
    close = difflib.get_close_matches(target, [kind for kind in KINDS if counts[kind]], n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    example = known[0].path if known else "none"
    return f"{hint}the model has {there or 'no matrix'}; patterns are over names such as {example}"
