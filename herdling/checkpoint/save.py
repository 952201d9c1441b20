"""Writing a model folder: shards with their index, config, tokenizer files, card; all or nothing."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from herdling.checkpoint.card import Card
from herdling.checkpoint.folder import INDEX, SINGLE
from herdling.checkpoint.quantized import is_quantized, write_model
from herdling.checkpoint.source import WANTED
from herdling.errors import CheckpointError, ConfigError
from herdling.files import atomic_folder, check_folder, write_json
from herdling.inputs import chat
from herdling.inputs.image_processor import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer
from herdling.model import weights
from herdling.model.config import ModelConfig

SHARD_BYTES = 4 * 10**9
REPLACEABLE = (*WANTED, "consolidated.*.pth")
"""What may be lost when a model takes the place of another."""


class ShardWriter:
    """Takes tensors one by one and writes them as shards, holding at most one shard in memory.

    With everything in a single shard the file is `model.safetensors`, else numbered shards and the
    index. Give it a fresh folder; it does not clean up (`atomic_folder` does).
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._held and self._held_bytes + tensor.nbytes > self.shard_bytes:
            self._flush()
        self._held[name] = tensor.detach().cpu().contiguous()
        self._held_bytes += tensor.nbytes
        self._total += tensor.nbytes

    def close(self) -> None:
        self._flush()
        count = len(self._shards)
        if count == 1:
            (self.folder / self._part(1)).rename(self.folder / SINGLE)
            return
        table: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            file = f"model-{number:05d}-of-{count:05d}.safetensors"
            (self.folder / self._part(number)).rename(self.folder / file)
            table |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(table.items()))}
        write_json(self.folder / INDEX, index)

    def _flush(self) -> None:
        if not self._held:
            return
        self._shards.append(list(self._held))
        # "pt" is what transformers asks for. No second key: safetensors writes them in random order,
        # and the same weights are to be the same file.
        save_file(self._held, self.folder / self._part(len(self._shards)), {"format": "pt"})
        self._held, self._held_bytes = {}, 0

    @staticmethod
    def _part(number: int) -> str:
        return f"part-{number:05d}.safetensors"


def save_model(
    model: nn.Module | Mapping[str, Tensor],
    config: ModelConfig,
    folder: Path | str,
    tokenizer: Tokenizer | None = None,
    processor: ImageProcessor | None = None,
    *,
    card: Card,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a complete model folder; a reader sees the old folder or the new one, never a mixture.

    A model with quantized weights becomes a compressed-tensors folder.

    Args:
        model: the model, or its state dict (what a sharded run gathers).
        tokenizer: saved along with the chat template; its ids fill the config's empty ones.
        processor: by default the one that the vision config implies.
        card: history and name; start a new one, or take `Card.open(...)` of what was loaded and
            add this stage with `.after(...)`, so that no lineage is lost.
        dtype: stored type; None keeps the type of the embedding.
        shard_bytes: a shard holds at most so many bytes, or one larger tensor.

    Raises ConfigError where `folder` holds more than a model (`check_target`) or the tokenizer does
    not fit, CheckpointError where the tensors are not those of the config.
    """
    check_target(folder)
    quantized = isinstance(model, nn.Module) and is_quantized(model)
    tensors = model if isinstance(model, Mapping) else model.state_dict()
    wanted = weights.shapes(config)
    if not quantized and (wrong := sorted(set(wanted) ^ set(tensors))):
        kind = "has no" if wrong[0] in wanted else "has an extra"
        raise CheckpointError(
            f"the model {kind} tensor {wrong[0]} for this config ({len(wrong)} differ); "
            "merge or unwrap it before saving"
        )
    stored = dtype or next(t.dtype for n, t in tensors.items() if n.endswith("embed_tokens.weight"))
    if tokenizer is not None:
        config = with_ids(config, tokenizer)
    with atomic_folder(folder) as temporary:
        writer = ShardWriter(temporary, shard_bytes)
        quantization = None
        if quantized:
            quantization = write_model(model, config, writer.add, stored)  # pyright: ignore[reportArgumentType]
        for name, shape in () if quantized else wanted.items():
            if tuple(tensors[name].shape) != shape:
                raise CheckpointError(
                    f"tensor {name} has shape {list(tensors[name].shape)}, the config needs "
                    f"{list(shape)}"
                )
            writer.add(name, tensors[name].to(stored))
        writer.close()
        save_config(temporary, config, stored, quantization)
        card.save(temporary, config)
        save_inputs(temporary, config, tokenizer, processor)


def check_target(folder: Path | str, source: Path | str | None = None) -> None:
    """Raise ConfigError unless a model may be written to `folder`, where it replaces what is there.

    It may where nothing is, over an empty folder, and over a model folder with nothing else in it;
    not over `source` (what is being read) or a folder around it, nor over the working folder.
    """
    folder = Path(folder)
    check_folder(folder, "folder")
    if not folder.exists():
        return
    remedy = "remedy: a new or an empty folder"
    if _holds(folder, Path.cwd()):
        raise ConfigError(f"{folder} is or holds the working folder; {remedy}")
    if source is not None and _holds(folder, Path(source)):
        raise ConfigError(f"{folder} is or holds {source}, which is being read; {remedy}")
    entries = sorted(folder.iterdir())
    for entry in entries:
        if entry.is_dir() or not any(fnmatchcase(entry.name, name) for name in REPLACEABLE):
            raise ConfigError(
                f"{folder} holds {entry.name}, no part of a model, and would be replaced; {remedy}"
            )
    if entries and not any((folder / name).exists() for name in ("config.json", "params.json")):
        raise ConfigError(f"{folder} is not empty and no model folder; {remedy}")


def _holds(folder: Path, inner: Path) -> bool:
    inner = inner.resolve()
    # samefile, as names may differ by links, and in case where the file system ignores it.
    return any(path.exists() and path.samefile(folder) for path in (inner, *inner.parents))


def save_config(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    quantization: dict[str, Any] | None = None,
) -> None:
    """Write config.json, with its quantization_config if any, and generation_config.json.

    The latter has Meta's sampling defaults.
    """
    raw = config.to_hf(str(dtype).removeprefix("torch."))
    write_json(
        folder / "config.json",
        raw | ({"quantization_config": quantization} if quantization else {}),
    )
    text = config.text
    ids: dict[str, Any] = {
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "pad_token_id": text.pad_token_id,
    }
    ids = {key: value for key, value in ids.items() if value is not None}
    # top_k 0: without it transformers samples from 50, Meta from all.
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0}
    write_json(folder / "generation_config.json", sampling | ids)


def save_inputs(
    folder: Path,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    processor: ImageProcessor | None,
) -> None:
    """Write what turns messages and pictures into ids and tiles."""
    if tokenizer is not None:
        tokenizer.save(folder)
        (folder / "chat_template.jinja").write_text(chat.template(), "utf-8")
    if config.vision is not None:
        (processor or ImageProcessor.from_vision_config(config.vision)).save(folder)


def with_ids(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The config with the tokenizer's control ids where it names none; ConfigError if they clash."""
    if len(tokenizer) > config.text.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} ids, the model's vocab_size is "
            f"{config.text.vocab_size}"
        )
    if config.vision is not None and config.image_token_index != tokenizer.patch:
        raise ConfigError(
            f"image_token_index is {config.image_token_index}, the tokenizer's <|patch|> is "
            f"{tokenizer.patch}; build the config with the tokenizer's ids"
        )
    ids = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tuple(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad,
    }
    empty = {key: value for key, value in ids.items() if getattr(config.text, key) is None}
    return replace(config, text=replace(config.text, **empty))


def copy_inputs(source: Path, folder: Path, names: Iterable[str]) -> list[str]:
    """Copy those of the named side files that exist; returns their names."""
    found = [name for name in names if (source / name).is_file()]
    for name in found:
        (folder / name).write_bytes((source / name).read_bytes())
    return found
