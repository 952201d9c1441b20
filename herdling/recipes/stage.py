"""What the training recipes share: a model, its data, and one call of the loop.

    RUN/config.yaml      the resolved settings     RUN/metrics.jsonl   loss, loads, held-out figures
    RUN/checkpoints/     for --resume              RUN/model/          the result, a model folder
    RUN/adapter/         with --lora: the adapter alone, which is merged in model/

A recipe gives its defaults and the further names its `--data` may use; everything else is here once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from herdling import config as settings
from herdling import distributed, lora
from herdling.checkpoint import Card, open_model, save_model
from herdling.checkpoint.card import NOTICE
from herdling.checkpoint.save import check_target, with_ids
from herdling.checkpoint.source import on_hub, resolve
from herdling.data.loader import Loader
from herdling.data.mixture import Mixture
from herdling.data.spec import Maker, Opening, open_sources
from herdling.errors import ConfigError
from herdling.inputs.image_processor import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.config import PRESETS, preset
from herdling.model.init import initialize
from herdling.model.llama import LanguageModel, build
from herdling.optim import adamw
from herdling.optim.adamw import AdamWConfig
from herdling.optim.schedule import Schedule
from herdling.train import rng
from herdling.train.health import Routing, RoutingConfig
from herdling.train.loop import Every, fit, make_accelerator
from herdling.train.losses import next_token
from herdling.train.state import CheckpointConfig, State

DATA_EVERY = 50
"""Steps between two lines about the data in metrics.jsonl."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The settings of a training run."""

    model: str
    """A model folder, a hub name, or a preset (nano, tiny, small, base) to start from random weights."""
    data: str
    """What to train on, with weights: builtin, code, english, pictures, task names, files."""
    out: Path
    """Folder of the run."""
    steps: int
    """Optimizer steps in all."""
    tokenizer: Path | None = None
    """Tokenizer folder; needed with a preset, else the model's own."""
    vision: bool = True
    """Whether a model made from a preset sees pictures."""
    split: Literal["train", "all"] = "train"
    """Which part of files and built-in text to train on; all leaves nothing to test on."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """What a byte of your files that is not UTF-8 does: stop the run, or become U+FFFD."""
    length: int = 512
    """Tokens in a row; documents are packed into rows and never see each other."""
    rows: int = 16
    """Rows in a micro-batch of one process."""
    accumulation: int = 1
    """Micro-batches in an optimizer step."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the matrix products; the weights stay float32."""
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
    seed: int = 0
    """Decides weights and data order; the same seed gives the same run."""
    resume: bool = False
    """Go on from the latest checkpoint in OUT."""

    def __post_init__(self) -> None:
        for name in ("steps", "length", "rows", "accumulation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.lora is not None:
            lora.LoraConfig.parse(self.lora)
            if self.model in PRESETS and not Path(self.model).exists():
                raise ConfigError(
                    f"--lora needs a trained model, and --model {self.model} starts from random "
                    "weights; remedy: --model FOLDER"
                )


@dataclass(frozen=True)
class Start:
    """What a run starts from."""

    model: LanguageModel
    tok: Tokenizer
    processor: ImageProcessor | None
    card: Card
    hub: tuple[str, ...] = ()
    """The name of the model, if it came from the hub."""


def start(stage: Stage) -> Start:
    """Open the model folder, or make the preset's model from random weights."""
    hub: tuple[str, ...] = ()
    if stage.model in PRESETS and not Path(stage.model).exists():
        if stage.tokenizer is None:
            raise ConfigError(
                f"--model {stage.model} is a preset and needs --tokenizer DIR; "
                "make one: herdling tokenizer --data builtin --out DIR"
            )
        tok = Tokenizer.open(stage.tokenizer)
        shape = replace(
            preset(stage.model, vision=stage.vision, vocab_size=len(tok)),
            image_token_index=tok.patch,
            boi_token_index=tok.special("<|image_start|>"),
            eoi_token_index=tok.special("<|image_end|>"),
        )
        model = initialize(build(with_ids(shape, tok)), stage.seed)
        card = Card(name=stage.out.name)
        vision = shape.vision
        processor = None if vision is None else ImageProcessor.from_vision_config(vision)
    else:
        if on_hub(stage.model):
            hub = (stage.model,)
        folder = resolve(stage.model)
        # Training keeps float32 weights, whatever the folder holds; --precision is for products.
        model, shape = open_model(folder, dtype=torch.float32)
        tok = Tokenizer.open(stage.tokenizer or folder)
        with_ids(shape, tok)  # a tokenizer that does not fit is told now, not at the end of the run
        card = Card.open(folder, shape)
        processor = None if shape.vision is None else ImageProcessor.open(folder)
    return Start(model, tok, processor, card, hub)


def identity(stage: Stage) -> dict[str, Any]:
    """The settings that a resumed run must share with its beginning: all but where and when.

    Folders may have moved: the weights come from the checkpoint, and a loader that reads other tokens
    than before says so itself.
    """
    anywhere = {"out", "resume", "tokenizer", *(() if stage.model in PRESETS else ("model",))}
    return {
        name: value
        for name, value in settings.flat(stage).items()
        if name not in anywhere and not name.startswith("checkpoint.")
    }


def run(
    stage: Stage, name: str, makers: Mapping[str, Maker], hooks: Sequence[Every] = ()
) -> LanguageModel:
    """Train, save OUT/model, return the model. Stopped runs resume exactly with `resume`."""
    state = State(  # first: a run that may not go on touches nothing
        stage.out,
        resume=stage.resume,
        title=name,
        config=stage.checkpoint,
        identity=identity(stage),
    )
    check_target(stage.out / "model")  # before the work, not after it
    rng.seed(stage.seed)
    accelerator = make_accelerator(stage.precision, stage.accumulation)
    begun = start(stage)
    if stage.lora is not None:
        lora.check_target(stage.out / "adapter")
        lora.attach(begun.model, lora.LoraConfig.parse(stage.lora), seed=stage.seed)
        if distributed.is_main():
            print(lora.table(begun.model))
    optimizer = adamw.build(begun.model, stage.optimizer)
    if stage.lora is not None:
        lora.spare_idle_experts(optimizer, begun.model)
    opening = Opening(
        begun.tok, stage.split, stage.seed, stage.length, begun.processor, stage.encoding_errors
    )
    sources = open_sources(stage.data, opening, makers)
    mixture = Mixture(sources, rank=distributed.rank(), world=distributed.world_size())
    loader = Loader(
        mixture,
        length=stage.length,
        batch_size=stage.rows,
        pad=begun.tok.pad,
        seed=stage.seed,
        prefetch=True,
    )
    if distributed.is_main():
        settings.save(stage, stage.out / "config.yaml")
    try:
        fit(
            begun.model,
            optimizer,
            loader,
            next_token,
            schedule=stage.schedule,
            steps=stage.steps,
            hooks=[Every(DATA_EVERY, lambda state: _log_data(state, loader)), *hooks],
            accelerator=accelerator,
            state=state,
            routing=Routing(begun.model, stage.routing),
        )
    finally:
        loader.close()
    note = f"{state.step} steps, {state.tokens} tokens"
    card = begun.card.after(
        name,
        name=stage.out.resolve().name,
        source=stage.model,
        data=[source.name for source, _ in sources],
        hub=begun.hub,
        note=note if stage.lora is None else f"{note}, LoRA {stage.lora} merged",
    )
    if stage.lora is not None:
        if distributed.is_main():
            _save_adapter(stage, begun, card, f"Trained by `herdling {name}`, {state.step} steps.")
        lora.merge(begun.model)
    if distributed.is_main():
        save_model(
            begun.model,
            begun.model.config,
            stage.out / "model",
            begun.tok,
            begun.processor,
            card=card,
        )
        print(f"{stage.out / 'model'}: trained on {state.tokens:,} tokens")
    return begun.model


def _save_adapter(stage: Stage, begun: Start, card: Card, how: str) -> None:
    duties = card.duties()
    about = lora.readme(
        begun.model, card.title, stage.model, how=how, on_hub=bool(begun.hub), duties=duties
    )
    files = {"README.md": about} | ({"NOTICE": NOTICE + "\n"} if duties else {})
    lora.save(begun.model, stage.out / "adapter", base=stage.model, files=files)


def _log_data(state: State, loader: Loader) -> None:
    """How full the rows were so far, how many examples were left out, each source's share."""
    numbers = loader.numbers()
    del numbers["tokens"]  # the loop's own line has them
    state.metrics.log(state.step, **numbers)
