"""Meta's own checkpoint folders, read and written: `consolidated.NN.pth` and `params.json`.

One file a model-parallel rank, each with its cut of every tensor (`model/meta_format.py`). Reading
maps the files into memory and puts one parameter together at a time; writing holds one rank's file.
This is the only place that unpickles, with `weights_only` (tensors and byte streams, no code).
"""

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from herdling.checkpoint.folder import DTYPES, nearest
from herdling.errors import CheckpointError, ConfigError
from herdling.files import read_json, write_json
from herdling.model import meta_format, meta_params, weights
from herdling.model.config import ModelConfig
from herdling.model.meta_format import Row

PARAMS = "params.json"
_FILE = re.compile(r"consolidated\.(\d+)\.pth")

Source = tuple[Row, int]
"""A stored tensor's row and which of its parts is meant."""


class Consolidated:
    """An opened Meta checkpoint: `config`, and `read` for one parameter under our name."""

    def __init__(
        self,
        files: list[Path],
        ranks: list[dict[str, Tensor]],
        config: ModelConfig,
    ) -> None:
        self.files = files
        self.ranks = ranks
        self.config = config
        self.shapes = weights.shapes(config)
        self.dtype = next(t.dtype for n, t in ranks[0].items() if n == "tok_embeddings.weight")
        self._sources = _match(files, ranks, config)

    @classmethod
    def open(
        cls,
        folder: Path | str,
        max_positions: int | None = None,
        tokens: dict[str, Any] | None = None,
    ) -> "Consolidated":
        """Open and check a folder; the arguments are those of `meta_params.to_config`."""
        folder = Path(folder)
        params = read_json(folder / PARAMS, CheckpointError)
        if not isinstance(params, dict):
            raise CheckpointError(f"{folder / PARAMS}: must be a JSON object")
        files = _files(folder)
        ranks = [_load(file) for file in files]
        if any(set(rank) != set(ranks[0]) for rank in ranks):
            odd = next(i for i, rank in enumerate(ranks) if set(rank) != set(ranks[0]))
            name = min(set(ranks[odd]) ^ set(ranks[0]))
            raise CheckpointError(
                f"{files[odd]}: tensor {name} is in only one of this file and {files[0].name}"
            )
        if "tok_embeddings.weight" not in ranks[0]:
            raise CheckpointError(f"{files[0]}: tensor tok_embeddings.weight is missing")
        vocab_size = ranks[0]["tok_embeddings.weight"].shape[0] * len(ranks)
        stated = params.get("vocab_size", -1)
        if stated not in (-1, vocab_size):
            raise CheckpointError(
                f"{folder / PARAMS}: vocab_size is {stated}, the embedding has {vocab_size} rows"
            )
        try:
            config = meta_params.to_config(params, vocab_size, max_positions, tokens)
        except (ConfigError, KeyError, TypeError) as problem:
            raise CheckpointError(f"{folder / PARAMS}: {problem}") from problem
        return cls(files, ranks, config)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One whole parameter, put together from every rank's file."""
        whole = torch.empty(self.shapes[name], dtype=dtype or self.dtype)
        count = len(self.ranks)
        for row, which in self._sources[name]:
            shapes = [self.shapes[part] for part in row.parts]
            for rank, held in enumerate(self.ranks if row.cut is not None else self.ranks[:1]):
                piece = meta_format.piece(held[row.stored], row, shapes, which, count)
                meta_format.block(whole, row, rank, count).copy_(piece)
        return whole


def write(config: ModelConfig, read: Callable[[str], Tensor], folder: Path, ranks: int = 1) -> None:
    """Write params.json and `ranks` weight files into `folder`, holding one file in memory.

    `read` gives one parameter by our name. Raises ConfigError when the format cannot hold the config.
    """
    params = meta_params.from_config(config)
    check_ranks(config, ranks)
    write_json(folder / PARAMS, params)
    for rank in range(ranks):
        held = {
            stored: meta_format.pack([read(part) for part in row.parts], row, rank, ranks)
            for stored, row in meta_format.rows(config, plain=False).items()
        }
        torch.save(held, folder / f"consolidated.{rank:02d}.pth")


def check_ranks(config: ModelConfig, ranks: int) -> None:
    """Raise ConfigError when some tensor, or the heads, cannot be cut into `ranks` equal parts."""
    if ranks < 1:
        raise ConfigError(f"model parallel size is {ranks}; it must be at least 1")
    heads = {"num_key_value_heads": config.text.num_key_value_heads}
    if config.vision:
        heads["vision num_attention_heads"] = config.vision.num_attention_heads
    for name, count in heads.items():
        if count % ranks:
            raise ConfigError(f"{name} is {count}; it cannot be cut into {ranks} files")
    shapes = weights.shapes(config)
    for row in meta_format.rows(config, plain=False).values():
        for part in row.parts if row.cut is not None else ():
            whole = torch.empty(shapes[part], device="meta")
            length = meta_format.block(whole, row, 0, 1).shape[row.cut or 0]
            if length % ranks:
                raise ConfigError(
                    f"{part} has length {length}; it cannot be cut into {ranks} files"
                )


def _files(folder: Path) -> list[Path]:
    """The rank files in order; a gap in the numbering is an error."""
    numbered = {}
    for file in folder.glob("consolidated.*.pth"):
        if match := _FILE.fullmatch(file.name):
            numbered[int(match[1])] = file
    if not numbered:
        raise CheckpointError(f"{folder}: has no consolidated.NN.pth")
    for number in range(max(numbered)):
        if number not in numbered:
            raise CheckpointError(f"{folder}: consolidated.{number:02d}.pth is missing")
    return [numbered[number] for number in sorted(numbered)]


def _load(file: Path) -> dict[str, Tensor]:
    """The named tensors of one file, mapped rather than read."""
    try:
        with torch.serialization.safe_globals([io.BytesIO, bytes]):
            raw = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as problem:
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        telling = [line.strip() for line in lines if "WeightsUnpickler error" in line]
        reason = (telling or lines)[0].split(" Please use ")[0]
        raise CheckpointError(f"{file}: cannot be read safely: {reason}") from problem
    if isinstance(raw, dict) and isinstance(raw.get("model"), dict):
        raw = raw["model"]
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: holds a {type(raw).__name__}, not named tensors")
    tensors = {}
    for name, value in raw.items():
        # Some values are byte streams of extra state beside the weights.
        if isinstance(value, io.BytesIO) or meta_format.dropped(name):
            continue
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{file}: {name} is a {type(value).__name__}, not a tensor")
        tensors[name] = value
    return tensors


def _match(
    files: list[Path], ranks: list[dict[str, Tensor]], config: ModelConfig
) -> dict[str, list[Source]]:
    """Our name -> stored tensors it is made of, after checking every name, type and shape."""
    rows = meta_format.rows(config, plain=True)
    shapes = weights.shapes(config)
    check_ranks(config, len(ranks))
    sources: dict[str, list[Source]] = {name: [] for name in shapes}
    for stored in ranks[0]:
        if stored not in rows:
            raise CheckpointError(f"{files[0]}: tensor {stored} is unexpected{_hint(stored, rows)}")
        row = rows[stored]
        expected = meta_format.stored_shape([shapes[p] for p in row.parts], row, len(ranks))
        for file, held in zip(files, ranks, strict=True):
            if held[stored].dtype not in DTYPES.values():
                raise CheckpointError(
                    f"{file}: tensor {stored} is {held[stored].dtype}; only float checkpoints can "
                    "be imported, use the bf16 release"
                )
            if tuple(held[stored].shape) != expected:
                raise CheckpointError(
                    f"{file}: tensor {stored} has shape {list(held[stored].shape)}, params.json "
                    f"and {len(ranks)} files need {list(expected)}"
                )
            if row.cut is None and not torch.equal(held[stored], ranks[0][stored]):
                raise CheckpointError(
                    f"{file}: tensor {stored} should be the same in every file but differs from "
                    f"{files[0].name}"
                )
        for which, part in enumerate(row.parts):
            sources[part].append((row, which))
    for name, found in sources.items():
        halves = sorted(str(row.half) for row, _ in found)
        wanted = ["0", "1"] if name.endswith("gate_up_proj") else ["None"]
        if halves != wanted:
            kind = "twice, under two names" if len(found) > len(wanted) else "missing"
            raise CheckpointError(f"{files[0].parent}: the data of {name} is {kind}")
    return sources


def _hint(stored: str, rows: dict[str, Row]) -> str:
    if stored.endswith("vision_encoder.positional_embedding"):
        return (
            ": it is the older table with the class token first; only files that hold "
            "positional_embedding_vlm can be imported"
        )
    return nearest(stored, rows)
