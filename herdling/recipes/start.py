"""What a training run starts from: a model folder, or a preset's random weights."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from herdling.checkpoint import Card, open_model
from herdling.checkpoint.save import with_ids
from herdling.checkpoint.source import on_hub, resolve
from herdling.config import nearest
from herdling.errors import ConfigError
from herdling.inputs.image_processor import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.config import PRESETS, preset
from herdling.model.init import initialize
from herdling.model.llama import LanguageModel, build


@dataclass(frozen=True)
class Start:
    """A model with all that belongs to it."""

    model: LanguageModel
    tok: Tokenizer
    processor: ImageProcessor | None
    card: Card
    hub: tuple[str, ...] = ()
    """The name of the model, if it came from the hub."""


def is_preset(model: str) -> bool:
    """Whether `--model` names a preset; a folder of that name comes first."""
    return model in PRESETS and not Path(model).exists()


def start(
    model: str, tokenizer: Path | None = None, *, name: str, vision: bool = True, seed: int = 0
) -> Start:
    """Open the model folder, or make the preset's model from random weights and call it `name`."""
    if is_preset(model):
        return _from_nothing(model, tokenizer, name, vision, seed)
    if "/" not in model and not Path(model).exists():
        raise ConfigError(
            f"model {model!r} is neither a folder nor a preset{nearest(model, list(PRESETS))}"
        )
    folder = resolve(model)
    # Training keeps float32 weights, whatever the folder holds; --precision is for products.
    opened, shape = open_model(folder, dtype=torch.float32)
    tok = Tokenizer.open(tokenizer or folder)
    with_ids(shape, tok)  # a tokenizer that does not fit is told now, not at the end of the run
    processor = None if shape.vision is None else ImageProcessor.open(folder)
    hub = (model,) if on_hub(model) else ()
    return Start(opened, tok, processor, Card.open(folder, shape), hub)


def _from_nothing(model: str, tokenizer: Path | None, name: str, vision: bool, seed: int) -> Start:
    if tokenizer is None:
        raise ConfigError(
            f"--model {model} is a preset and needs --tokenizer DIR; "
            "make one: herdling tokenizer --data builtin --out DIR"
        )
    tok = Tokenizer.open(tokenizer)
    shape = replace(
        preset(model, vision=vision, vocab_size=len(tok)),
        image_token_index=tok.patch,
        boi_token_index=tok.special("<|image_start|>"),
        eoi_token_index=tok.special("<|image_end|>"),
    )
    made = initialize(build(with_ids(shape, tok)), seed)
    processor = None if shape.vision is None else ImageProcessor.from_vision_config(shape.vision)
    return Start(made, tok, processor, Card(name=name))
