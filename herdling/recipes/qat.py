"""Quantization-aware tuning, the whole published chain: from a tuned model to one that runs in few bits.

    herdling qat --model runs/chat/model --data tasks --out runs/w4a8 --format w4a8 \\
        --full.steps 300 --adapter.steps 150 --preference.steps 50

As Meta made the quantized Llama 3.2 (1B/3B; model card): full tuning with rounded weights and
activations; then frozen, an adapter in full precision on every matrix, routed experts included; then
DPO on backbone and adapter together. Each is a stage with a folder of its own and is left out with 0
steps; what is finished is not done again, what was stopped goes on.

    OUT/full  OUT/adapter  OUT/preference      the stages, as `sft` and `dpo` leave them
    OUT/quantized                              the codes of the last one, a folder that loads
    OUT/lora                                   its adapter: herdling chat OUT/quantized --adapter OUT/lora
"""

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from herdling import config as settings
from herdling import distributed
from herdling.errors import ConfigError, at_least
from herdling.files import atomic_folder
from herdling.optim.config import AdamWConfig
from herdling.recipes import dpo, sft
from herdling.recipes.settings import Training
from herdling.train.precision import Precision


@dataclass(frozen=True)
class Full:
    """All weights, rounded in every forward."""

    steps: int = 300
    """Optimizer steps; 0 leaves the stage out."""
    learning_rate: float = 2e-4
    """Peak of the rate."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on the frozen, rounded weights."""

    steps: int = 150
    """Optimizer steps; 0 leaves the stage out."""
    learning_rate: float = 1e-3
    """Peak of the rate."""
    lora: str = "r=16,alpha=32,targets=attention+shared+experts"
    """Rank, scale, and the matrices it reaches."""


@dataclass(frozen=True)
class Preference:
    """DPO on weights and adapter."""

    steps: int = 50
    """Optimizer steps; 0 leaves the stage out."""
    learning_rate: float = 5e-6
    """Peak of the rate."""
    data: str = "preferences"
    """Pairs, as `herdling dpo --data` takes them."""
    pairs: int = 512
    """How many pairs at most."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tune a model so that it loses little in few bits: full, then an adapter, then DPO."""

    model: str
    """Folder of the tuned model in full precision."""
    out: Path
    """Folder of the run."""
    data: str = "tasks"
    """What to train on, with weights: tasks, task names, JSON lines of conversations."""
    format: str = "w4a8"
    """Scheme of weights and activations, such as w4a8, w8a8, int4_g128."""
    full: Full = field(default_factory=Full)
    """First stage."""
    adapter: Adapter = field(default_factory=Adapter)
    """Second stage."""
    preference: Preference = field(default_factory=Preference)
    """Third stage."""
    length: int = 512
    """Tokens in a row."""
    rows: int = 16
    """Rows in a micro-batch of one process."""
    precision: Precision = "fp32"
    """Type of the matrix products."""
    seed: int = 0
    """Decides the data order and the adapter's beginning."""

    def __post_init__(self) -> None:
        from herdling.lora import LoraConfig
        from herdling.quant.schemes import scheme

        scheme(self.format)
        at_least(self, length=1, rows=1)
        at_least(self.preference, "preference.", pairs=1)
        for stage in (self.full, self.adapter, self.preference):  # all, before the first begins
            AdamWConfig(learning_rate=stage.learning_rate)
        LoraConfig.parse(self.adapter.lora)
        steps = (self.full.steps, self.adapter.steps, self.preference.steps)
        if min(steps) < 0 or not any(steps):
            raise ConfigError(f"steps are {steps}; one must be above 0, none below")
        if self.preference.steps and not self.adapter.steps:
            raise ConfigError(
                "preference.steps without adapter.steps; remedy: herdling dpo --qat, which needs none"
            )


def main(config: Config) -> int:
    _refuse_another_chain(config)
    config.out.mkdir(parents=True, exist_ok=True)
    if distributed.is_main():
        settings.save(config, config.out / "config.yaml")
    last, backbone, own = config.out, config.model, _shared(config)
    if config.full.steps:
        last = config.out / "full"
        rate = AdamWConfig(learning_rate=config.full.learning_rate)
        stage = sft.Config(**own(last, backbone, config.full.steps, rate), **_rows(config))
        _once(stage, sft.main)
        backbone = str(last / "model")
    if config.adapter.steps:
        last = config.out / "adapter"
        rate = AdamWConfig(learning_rate=config.adapter.learning_rate)
        stage = sft.Config(**own(last, backbone, config.adapter.steps, rate), **_rows(config))
        _once(replace(stage, lora=config.adapter.lora), sft.main)
    if config.preference.steps:
        adapter, last = last / "adapter", config.out / "preference"
        rate = AdamWConfig(learning_rate=config.preference.learning_rate, weight_decay=0.0)
        stage = dpo.Config(
            **own(last, backbone, config.preference.steps, rate),
            data=config.preference.data, pairs=config.preference.pairs,
            batch=max(1, config.rows // 2), length=config.length, adapter=adapter,
        )  # fmt: skip
        _once(stage, dpo.main)
    if distributed.is_main():
        for name, to in (("quantized", "quantized"), ("adapter", "lora")):
            if (last / name).is_dir():
                with atomic_folder(config.out / to) as folder:
                    shutil.copytree(last / name, folder, dirs_exist_ok=True)
        print(f"{config.out / 'quantized'}: {config.format} after {last.name}")
    distributed.barrier()
    return 0


def _refuse_another_chain(config: Config) -> None:
    """Finished stages are not done again, so those of other settings would pass for these."""
    held = config.out / "config.yaml"
    begun = any((config.out / stage).exists() for stage in ("full", "adapter", "preference"))
    if not held.exists() or not begun:
        return
    before = replace(settings.load(Config, held), out=config.out)
    if changes := settings.differences(before, config):
        raise ConfigError(
            f"{config.out} holds a chain with other settings ({', '.join(changes)}); "
            "remedy: the same settings, or another --out"
        )


def _shared(config: Config) -> Any:
    def settings_of(out: Path, model: str, steps: int, rate: AdamWConfig) -> dict[str, Any]:
        return dict(out=out, model=model, steps=steps, optimizer=rate, qat=config.format,
                    precision=config.precision, seed=config.seed, resume=True)  # fmt: skip

    return settings_of


def _rows(config: Config) -> dict[str, Any]:
    return dict(data=config.data, length=config.length, rows=config.rows)


def _once(stage: Training, run: Any) -> None:
    """Do a stage unless its result is there; `quantized` is what a stage writes last."""
    if not (stage.out / "quantized").is_dir():
        run(stage)
