"""The work of `herdling export`; `herdling.recipes.export` has the settings."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from herdling.checkpoint import consolidated
from herdling.checkpoint.card import Card
from herdling.checkpoint.consolidated import Consolidated
from herdling.checkpoint.folder import Folder
from herdling.checkpoint.save import ShardWriter, check_target, copy_inputs, save_config
from herdling.checkpoint.source import on_hub
from herdling.errors import CheckpointError, ConfigError
from herdling.export.gguf import limits, text, vision, writing
from herdling.export.gguf.adapter import adapter
from herdling.files import atomic_folder, check_file, read_json
from herdling.lora import peft_folder
from herdling.model import weights
from herdling.recipes.export import Config
from herdling.recipes.import_meta_run import find_tokenizer, parse_dtype, same, token_ids

# Side files that hold as they are in any copy of the model.
INPUTS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
          "chat_template.jinja", "preprocessor_config.json", "processor_config.json", "LICENSE",
          "LICENSE.txt")  # fmt: skip

SETTINGS = {
    "dtype": ("hf", "meta"),
    "model_parallel": ("meta",),
    "type": ("gguf",),
    "base": ("gguf",),
}
"""Settings that only some targets take."""


def run(config: Config) -> None:
    """Export and compare. Raises ConfigError for an unknown target or an OUT that holds other things,
    CheckpointError otherwise.
    """
    if config.to not in (*TARGETS, "gguf"):
        known = ", ".join([*TARGETS, "gguf"])
        raise ConfigError(f"--to {config.to} is not an export format; there are {known}")
    for name, targets in SETTINGS.items():
        default = Config.__dataclass_fields__[name].default
        if config.to not in targets and getattr(config, name) != default:
            raise ConfigError(
                f"--{name.replace('_', '-')} is for --to {' and '.join(targets)}, not {config.to}"
            )
    if config.to == "gguf":
        return _to_gguf(config)
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


def _to_gguf(config: Config) -> None:
    out = config.out
    if out.suffix != ".gguf" or out.is_dir():
        raise ConfigError(f"{out} is no name of a GGUF file; remedy: {out.with_suffix('.gguf')}")
    check_file(out, "out")
    if (Path(config.path) / peft_folder.CONFIG).is_file():
        return _adapter_to_gguf(config)
    source = Folder.open(config.path)
    kind = config.type or GGUF_TYPES[source.dtype]
    exact = limits.exact_tokens(source.config.text)
    if exact < source.config.text.max_position_embeddings:
        warnings.warn(
            f"llama.cpp computes what this model does up to {exact} tokens of context only (its chunks "
            f"and temperature floor are {limits.CHUNK}), so the file says context_length {exact}",
            stacklevel=1,
        )
    _write_gguf(out, *text.model(source, kind))
    if source.config.vision is not None:
        _write_gguf(out.with_name(f"mmproj-{out.name}"), *vision.projector(source))
    if duties := Card.open(source.path, source.config).duties():
        print(duties)


def _adapter_to_gguf(config: Config) -> None:
    named = read_json(Path(config.path) / peft_folder.CONFIG, CheckpointError)
    base = config.base or (named if isinstance(named, dict) else {}).get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{config.path} does not say which model it adapts; give --base")
    _write_gguf(config.out, *adapter(config.path, Folder.open(base), config.type or "f32"))


def _write_gguf(out: Path, fields: writing.Fields, entries: list[writing.Entry]) -> None:
    total = writing.write(out, fields, entries)
    kinds = ", ".join(f"{n / 2**20:.1f} MB {kind}" for kind, n in total.items())
    print(f"{out}: {len(entries)} tensors ({kinds}) written, read back and equal")


GGUF_TYPES = {
    torch.float32: "f32", torch.float64: "f32", torch.float16: "f16", torch.bfloat16: "bf16"
}  # fmt: skip


def _compare(source: Folder, written: Folder | Consolidated, dtype: torch.dtype) -> None:
    for name in weights.shapes(source.config):
        if not same(written.read(name), source.read(name, dtype)):
            raise CheckpointError(f"{name} reads back differently from the export; nothing kept")


TARGETS: dict[str, Callable[[Folder, Config, torch.dtype], None]] = {
    "hf": _to_hf,
    "meta": _to_meta,
}
