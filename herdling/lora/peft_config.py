"""`adapter_config.json` as peft writes and reads it, and which matrices it means.

Rules as in peft 0.21: names in `target_modules` and `target_parameters` match whole or as the end of
a dotted name, a string is a regular expression over the whole name, and patterns of ranks and alphas
are regular expressions over the end of a name.
"""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from herdling.errors import CheckpointError
from herdling.lora.layers import Factors
from herdling.model.sites import Site, sites

WRITTEN_AS = "0.19.0"
"""The first peft that lays experts out as we write them (see `peft_folder`)."""

UNDERSTOOD = {"peft_type", "r", "lora_alpha", "target_modules", "target_parameters",
              "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
              "bias"}  # fmt: skip
HARMLESS = {"task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
            "lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config",
            "peft_version", "ephemeral_gpu_offload", "layers_pattern", "init_lora_weights",
            "ensure_weight_tying", "save_embedding_layers"}  # fmt: skip
"""What changes nothing once an adapter is trained (fan_in_fan_out: peft itself drops it for Linear)."""
REBASING = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` under which peft changes the base weights too."""


@dataclass(frozen=True)
class Target:
    """What a config says of one matrix."""

    r: int
    alpha: float
    by_parameter: bool
    """Reached through `target_parameters`."""


class PeftConfig:
    """A parsed adapter_config.json."""

    def __init__(self, raw: Any, file: str) -> None:
        """Raises CheckpointError for a config that is no LoRA, or does what is not done here."""
        if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
            found = raw.get("peft_type") if isinstance(raw, dict) else raw
            raise CheckpointError(
                f"{file}: peft_type is {found!r}; only LORA adapters can be opened"
            )
        self.raw: dict[str, Any] = raw
        self.file = file
        for key, value in raw.items():
            if value and key not in UNDERSTOOD | HARMLESS:
                raise CheckpointError(f"{file}: {key} is {value!r}, which is not supported")
        if raw.get("bias", "none") != "none":
            raise CheckpointError(f"{file}: bias is {raw['bias']!r}; only none is supported")
        if str(raw.get("init_lora_weights")).lower().startswith(REBASING):
            raise CheckpointError(
                f"{file}: init_lora_weights is {raw['init_lora_weights']!r}, for which peft changes "
                "the base model too; remedy: convert it to a plain LoRA in peft, or merge it there"
            )
        self._check_types()
        self.rslora, self.dora = bool(raw.get("use_rslora")), bool(raw.get("use_dora"))
        self.version = str(raw.get("peft_version") or "")

    def _check_types(self) -> None:
        """Raise CheckpointError for a setting of another type than peft gives it."""
        for key in ("use_rslora", "use_dora"):
            if not isinstance(value := self.raw.get(key), bool | None):
                raise CheckpointError(f"{self.file}: {key} is {value!r}; it must be true or false")
        for key in ("target_modules", "exclude_modules", "target_parameters"):
            value, one = self.raw.get(key), key != "target_parameters"
            if one and isinstance(value, str):
                self._compile(key, value)
            elif value is not None and not (
                isinstance(value, list) and all(isinstance(name, str) for name in value)
            ):
                what = "names or a regular expression" if one else "names"
                raise CheckpointError(f"{self.file}: {key} is {value!r}; it must be {what}")
        for key in ("rank_pattern", "alpha_pattern"):
            if not isinstance(value := self.raw.get(key) or {}, dict):
                raise CheckpointError(
                    f"{self.file}: {key} is {value!r}; it must map patterns to numbers"
                )
            for pattern in value:
                self._compile(key, pattern)

    def _compile(self, key: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except re.error as problem:
            raise CheckpointError(
                f"{self.file}: {key}: {pattern!r} is no regular expression: {problem}"
            ) from None

    def targets(self, model: nn.Module) -> dict[Site, Target]:
        """The matrices that this config means; CheckpointError where a name matches none."""
        modules, parameters = self.raw.get("target_modules"), self.raw.get("target_parameters")
        known = sites(model)
        found: dict[Site, Target] = {}
        for site in known:
            by_parameter = _ends(site.parameter, parameters or ())
            if by_parameter or self._module(site, modules):
                name = site.parameter if by_parameter else site.path
                r = self._pattern("rank_pattern", name, self.raw.get("r"))
                alpha = self._pattern("alpha_pattern", name, self.raw.get("lora_alpha"))
                found[site] = Target(int(r), float(alpha), by_parameter)
        for name in [modules] if isinstance(modules, str) else modules or ():
            mine = name if isinstance(modules, str) else (name,)
            self._check_meant(name, (_is_module(site, mine) for site in known))
        for name in parameters or ():
            self._check_meant(name, (_ends(site.parameter, (name,)) for site in known))
        return found

    def _check_meant(self, name: str, matches: Iterable[bool]) -> None:
        if not any(matches):
            raise CheckpointError(f"{self.file}: target {name!r} matches nothing in this model")

    def _module(self, site: Site, modules: str | Sequence[str] | None) -> bool:
        excluded = self.raw.get("exclude_modules") or ()
        return _is_module(site, modules or ()) and not _ends(site.path, excluded)

    def _pattern(self, key: str, name: str, default: Any) -> float:
        patterns: Mapping[str, Any] = self.raw.get(key) or {}
        value = next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", name)), default)
        whole = key == "rank_pattern"
        fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not fits or not 0 < value <= sys.float_info.max:
            raise CheckpointError(
                f"{self.file}: {key} or default for {name} is {value!r}; it must be a "
                f"{'whole ' if whole else ''}number above 0"
            )
        return value


def _is_module(site: Site, modules: str | Iterable[str]) -> bool:
    """Whether names, or one regular expression, of `target_modules` mean a site."""
    if site.fused:
        return False
    if modules == "all-linear":
        return site.kind != "head"
    return _ends(site.path, modules)


def _ends(name: str, targets: str | Iterable[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def to_peft(
    model: nn.Module, factors: Mapping[str, tuple[Site, Factors]], base: str
) -> dict[str, Any]:
    """The adapter_config.json of an adapter. `base`: folder or hub name of the model it belongs to."""
    entries = list(factors.values())
    linears = {s.path for s, _ in entries if not by_parameter(s)}
    fused = {s.parameter for s, _ in entries if by_parameter(s)}
    first = entries[0][1]
    ranks = {peft_name(s): f.r for s, f in entries if f.r != first.r}
    alphas = {peft_name(s): f.alpha for s, f in entries if f.alpha != first.alpha}
    return {
        "peft_type": "LORA",
        "peft_version": WRITTEN_AS,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": first.r,
        "lora_alpha": _whole(first.alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": first.rslora,
        "use_dora": first.magnitude is not None,
        "rank_pattern": ranks,
        "alpha_pattern": {name: _whole(alpha) for name, alpha in alphas.items()},
        "target_modules": shortest(linears, [name for name, _ in model.named_modules()]),
        "target_parameters": shortest(fused, _parameters(model), least=3) or None,
        "modules_to_save": None,
    }


def by_parameter(site: Site) -> bool:
    """Whether peft reaches it through target_parameters: fused tensors, and the router, whose module
    in transformers returns more than a linear's result."""
    return site.fused is not None or site.kind == "router"


def peft_name(site: Site) -> str:
    """The name that peft matches patterns with."""
    return site.parameter if by_parameter(site) else site.path


def shortest(wanted: set[str], names: Iterable[str], least: int = 1) -> list[str]:
    """Ends of dotted names, of `least` parts or more, that mean `wanted` and no other of `names`."""
    others = {end for name in names if name not in wanted for end in _endings(name)}
    chosen = set()
    for name in wanted:
        ends = [end for end in _endings(name) if end.count(".") >= least - 1] or [name]
        chosen.add(next((end for end in ends if end not in others), name))
    return sorted(chosen)


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


def _parameters(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if ".lora." not in name]


def _whole(number: float) -> int | float:
    return int(number) if number == int(number) else number
