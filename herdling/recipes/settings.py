"""The settings that training recipes share. No torch is loaded for them, so that `--help` is quick."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from herdling.errors import ConfigError, at_least
from herdling.optim.config import AdamWConfig
from herdling.optim.schedule import Schedule
from herdling.train.config import CheckpointConfig, GradientBits, RoutingConfig
from herdling.train.precision import LOW, Precision


@dataclass(frozen=True, kw_only=True)
class Training:
    """The settings of any training run."""

    model: str
    """A model folder, a hub name, or a preset (nano, tiny, small, base) to start from random weights."""
    out: Path
    """Folder of the run."""
    steps: int
    """Optimizer steps in all."""
    tokenizer: Path | None = None
    """Tokenizer folder; needed with a preset, else the model's own."""
    vision: bool = True
    """Whether a model made from a preset sees pictures."""
    accumulation: int = 1
    """Micro-batches in an optimizer step."""
    precision: Precision = "fp32"
    """Type of the matrix products; the weights stay float32. Below 16 bits: those of blocks only."""
    gradient_bits: GradientBits = 32
    """Bits of a gradient between processes; 8 and 4 with error feedback."""
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    """How the weights move."""
    schedule: Schedule = field(default_factory=Schedule)
    """The learning rate over the run."""
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    """How experts are kept busy."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the run is saved."""
    lora: str | None = None
    """Train an adapter in place of the weights, such as r=16,alpha=32,targets=attention+experts."""
    adapter: Path | None = None
    """Adapter folder to go on training, together with the weights."""
    quantize: str | None = None
    """Keep the weights below --lora in this format, such as int4 or nf4 (QLoRA)."""
    qat: str | None = None
    """Round weights and activations in every forward as this format does, such as w4a8."""
    seed: int = 0
    """Decides weights and data order; the same seed gives the same run."""
    resume: bool = False
    """Go on from the latest checkpoint in OUT."""

    def __post_init__(self) -> None:
        at_least(self, steps=1, accumulation=1)
        if self.lora is not None:
            from herdling.lora import LoraConfig
            from herdling.recipes.start import is_preset

            LoraConfig.parse(self.lora)
            if is_preset(self.model):
                raise ConfigError(
                    f"--lora needs a trained model, and --model {self.model} starts from random "
                    "weights; remedy: --model FOLDER"
                )
        for name in ("quantize", "qat"):
            if (given := getattr(self, name)) is not None:
                from herdling.quant.schemes import scheme

                scheme(given)
        lora = self.lora is not None  # an empty one means the defaults
        for wrong, remedy in (
            (self.quantize and not lora, "--quantize needs --lora, as codes do not train"),
            (self.quantize and self.qat, "--quantize and --qat exclude each other"),
            (lora and self.adapter, "--lora is a new adapter; leave it out with --adapter"),
            (
                self.precision in LOW and (lora or self.adapter or self.qat),
                f"--precision {self.precision} trains plain weights; remedy: bf16",
            ),
        ):
            if wrong:
                raise ConfigError(remedy)


@dataclass(frozen=True, kw_only=True)
class Stage(Training):
    """The settings of a training run on packed examples."""

    data: str
    """What to train on, with weights: builtin, code, english, pictures, task names, files."""
    split: Literal["train", "all"] = "train"
    """Which part of files and built-in text to train on; all leaves nothing to test on."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """What a byte of your files that is not UTF-8 does: stop the run, or become U+FFFD."""
    length: int = 512
    """Tokens in a row; documents are packed into rows and never see each other."""
    rows: int = 16
    """Rows in a micro-batch of one process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, length=1, rows=1)
