"""The work of `herdling import-meta`; `herdling.recipes.import_meta` has the settings."""

from pathlib import Path
from typing import Any

import torch

from herdling.checkpoint.card import Card, Touch
from herdling.checkpoint.consolidated import Consolidated
from herdling.checkpoint.folder import Folder
from herdling.checkpoint.save import (
    ShardWriter,
    check_target,
    save_config,
    save_inputs,
    with_ids,
)
from herdling.errors import CheckpointError, ConfigError
from herdling.files import atomic_folder
from herdling.inputs.tokenizer import Tokenizer
from herdling.recipes.import_meta import Config

LLAMA4_VOCABULARY = 202048
"""Size of Meta's vocabulary, whose control ids our config has as defaults."""


def run(config: Config) -> None:
    """Convert, write atomically, read back, compare. Raises CheckpointError or ConfigError."""
    check_target(config.out, config.path)
    if config.max_positions is not None and config.max_positions < 1:
        raise ConfigError(f"max_positions is {config.max_positions}; it must be at least 1")
    tokenizer = find_tokenizer(config.tokenizer or config.path)
    if config.tokenizer is not None and tokenizer is None:
        raise ConfigError(
            f"--tokenizer {config.tokenizer} is no file, and no folder with tokenizer.model or "
            "tokenizer.json"
        )
    tokens = token_ids(tokenizer) if tokenizer else {}
    source = Consolidated.open(config.path, config.max_positions, tokens)
    model = source.config
    if tokenizer is None and model.text.vocab_size != LLAMA4_VOCABULARY:
        raise CheckpointError(
            f"{config.path}: has no tokenizer.model, and its vocabulary of "
            f"{model.text.vocab_size} is not Llama 4's; give --tokenizer"
        )
    if tokenizer is not None:
        model = with_ids(model, tokenizer)
    dtype = parse_dtype(config.dtype) or source.dtype
    name = config.out.resolve().name
    recorded = Card.recorded(config.path)
    touch: Touch = "weights" if config.llama and recorded is None else ""
    card = (recorded or Card(name)).after(
        "import-meta",
        name=name,
        source=config.path.resolve().name,
        note=f"from {len(source.files)} consolidated file(s)",
        llama=touch,
    )
    with atomic_folder(config.out) as temporary:
        writer = ShardWriter(temporary)
        for name in source.shapes:
            writer.add(name, source.read(name, dtype))
        writer.close()
        save_config(temporary, model, dtype)
        card.save(temporary, model)
        save_inputs(temporary, model, tokenizer, None)
        written = Folder.open(temporary)
        for name in source.shapes:
            if not same(written.read(name), source.read(name, dtype)):
                raise CheckpointError(f"{config.out}: {name} reads back differently; nothing kept")
    print(
        f"{config.out}: {len(source.shapes)} tensors written in {dtype}, read back and equal; "
        f"max_position_embeddings noted as {model.text.max_position_embeddings}"
    )
    if tokenizer is None:
        print(f"{config.out}: no tokenizer was found in {config.path}, so none is written")
    if duties := card.duties():
        print(duties)


def find_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer of a file or a folder in either format; None if the folder has none."""
    if path.is_file():
        return Tokenizer.from_tiktoken(path)
    if (path / "tokenizer.model").is_file():
        return Tokenizer.from_tiktoken(path / "tokenizer.model")
    if (path / "tokenizer.json").is_file():
        return Tokenizer.open(path)
    return None


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Control token ids by config field."""
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tuple(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad,
        "image_token_index": tokenizer.patch,
        "boi_token_index": tokenizer.special("<|image_start|>"),
        "eoi_token_index": tokenizer.special("<|image_end|>"),
    }


def parse_dtype(name: str | None) -> torch.dtype | None:
    """A torch float type by name; None stays None."""
    if name is None:
        return None
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigError(f"dtype is {name!r}; there are {', '.join(known)}")
    return known[name]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit (so that NaN equals itself)."""
    return a.dtype == b.dtype and torch.equal(
        a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)
    )
