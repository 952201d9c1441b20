"""From a model folder to another format, read back and compared before it says done.

Run: herdling export PATH OUT --to hf [--dtype bfloat16]
     herdling export PATH OUT --to meta [--model-parallel 8]
`hf` writes the canonical folder: fused experts, current config spelling, shards with an index.
`meta` writes consolidated.NN.pth and params.json. Left out here: GGUF, PEFT, compressed-tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tyro.conf import Positional

from herdling.checkpoint import consolidated
from herdling.checkpoint.card import Card
from herdling.checkpoint.consolidated import Consolidated
from herdling.checkpoint.folder import Folder
from herdling.checkpoint.save import ShardWriter, check_target, copy_inputs, save_config
from herdling.checkpoint.source import on_hub
from herdling.errors import CheckpointError, ConfigError
from herdling.files import atomic_folder
from herdling.model import weights
from herdling.recipes.import_meta import find_tokenizer, parse_dtype, same, token_ids

# Side files that hold as they are in any copy of the model.
INPUTS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
          "chat_template.jinja", "preprocessor_config.json", "processor_config.json", "LICENSE",
          "LICENSE.txt")  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Write a model in another format, and compare it after re-loading."""

    path: Positional[str]
    """Model folder or hub name."""
    out: Positional[Path]
    """Folder to write: new, empty, or a model folder to be replaced."""
    to: str
    """Target format: hf or meta."""
    dtype: str | None = None
    """Stored type (float32, bfloat16, float16); default: the folder's own."""
    model_parallel: int = 1
    """For meta: how many files each tensor is cut over."""


def main(config: Config) -> None:
    """Export and compare. Raises ConfigError for an unknown target or an OUT that holds other things,
    CheckpointError otherwise.
    """
    if config.to not in TARGETS:
        raise ConfigError(
            f"--to {config.to} is not an export format; there are {', '.join(TARGETS)}"
        )
    check_target(config.out, None if on_hub(config.path) else config.path)
    source = Folder.open(config.path)
    dtype = parse_dtype(config.dtype) or source.dtype
    TARGETS[config.to](source, config, dtype)
    print(f"{config.out}: written as {config.to} in {dtype}, read back and equal to {config.path}")


def _to_hf(source: Folder, config: Config, dtype: torch.dtype) -> None:
    card = Card.open(source.path, source.config)
    card = card.after("export", name=config.out.resolve().name, note=f"to hf in {dtype}")
    with atomic_folder(config.out) as temporary:
        writer = ShardWriter(temporary)
        for name in weights.shapes(source.config):
            writer.add(name, source.read(name, dtype))
        writer.close()
        save_config(temporary, source.config, dtype)
        card.save(temporary, source.config)
        copy_inputs(source.path, temporary, (*INPUTS, "generation_config.json"))
        _compare(source, Folder.open(temporary), dtype)


def _to_meta(source: Folder, config: Config, dtype: torch.dtype) -> None:
    card = Card.open(source.path, source.config)
    card = card.after("export", name=config.out.resolve().name, note=f"to meta in {dtype}")
    tokenizer = find_tokenizer(source.path)
    with atomic_folder(config.out) as temporary:
        consolidated.write(
            source.config, lambda name: source.read(name, dtype), temporary, config.model_parallel
        )
        card.save(temporary, source.config)
        copy_inputs(source.path, temporary, INPUTS)
        tokens = token_ids(tokenizer) if tokenizer else {}
        written = Consolidated.open(temporary, source.config.text.max_position_embeddings, tokens)
        _compare(source, written, dtype)


def _compare(source: Folder, written: Folder | Consolidated, dtype: torch.dtype) -> None:
    for name in weights.shapes(source.config):
        if not same(written.read(name), source.read(name, dtype)):
            raise CheckpointError(f"{name} reads back differently from the export; nothing kept")


TARGETS: dict[str, Callable[[Folder, Config, torch.dtype], None]] = {
    "hf": _to_hf,
    "meta": _to_meta,
}
