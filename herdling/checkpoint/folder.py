"""A model folder, read: what its config says, where each tensor lies, and the tensors themselves.

Opening reads headers only and checks everything a header can tell (names, shapes, types, duplicates,
gaps, truncation) before any weight is read. Tensors are then copied out of memory-mapped shards one
at a time, so reading costs the destination plus the pages of one shard. A folder with quantized weights
(compressed-tensors) is opened as well; `quantized.py` knows those.
"""

import difflib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from herdling.checkpoint.quantized import Part, Plan
from herdling.checkpoint.source import resolve
from herdling.errors import CheckpointError, ConfigError
from herdling.files import read_json
from herdling.model import weights
from herdling.model.config import ModelConfig
from herdling.model.weights import Slot
from herdling.quant.modules import Matrix

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """One tensor of a shard and where it belongs."""

    name: str
    slot: Slot


class Folder:
    """An opened model folder. `shards` lists the tensors of each file; weights are still on disk."""

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        dtype: torch.dtype,
        shards: dict[Path, list[Stored]],
        plan: Plan | None = None,
        coded: dict[str, Path] | None = None,
    ) -> None:
        self.path = path
        self.config = config
        self.dtype = dtype
        """The type that config.json names, else that of the stored embedding."""
        self.shards = shards
        self.plan = plan
        """Of the quantized weights, where there are any; they are in no shard's list."""
        self._coded = coded or {}
        self._places: dict[str, dict[Path, list[Stored]]] = {}
        for file, entries in shards.items():
            for entry in entries:
                places = self._places.setdefault(entry.slot.parameter, {})
                places.setdefault(file, []).append(entry)

    @classmethod
    def open(cls, folder: Path | str) -> "Folder":
        """Open and check a local folder or a hub name. Raises CheckpointError or ConfigError."""
        path = resolve(folder)
        config, named, quantization = read_config(path)
        try:
            plan = Plan(config, quantization) if quantization else None
        except (ConfigError, CheckpointError) as problem:
            raise CheckpointError(f"{path / 'config.json'}: {problem}") from problem
        slots = weights.slots(config)
        if plan is not None:
            slots = {name: s for name, s in slots.items() if s.parameter not in plan.groups}
        shards: dict[Path, list[Stored]] = {}
        seen: dict[str, Path] = {}
        filled = dict.fromkeys(weights.shapes(config), 0)
        stored_dtype, scale_dtype = torch.float32, None
        for file, expected in _shard_files(path).items():
            shards[file] = []
            with opened(file) as shard:
                names = shard.keys()
                _check_index(file, expected, set(names))
                for name in names:
                    part = shard.get_slice(name)
                    if name in seen:
                        raise CheckpointError(f"{file}: tensor {name} is also in {seen[name].name}")
                    seen[name] = file
                    if plan is not None and name in plan.parts:
                        if wrong := plan.check(name, part.get_dtype(), part.get_shape()):
                            raise CheckpointError(f"{file}: tensor {name} {wrong}")
                        if name.endswith("_scale") and part.get_dtype() in DTYPES:
                            scale_dtype = DTYPES[part.get_dtype()]
                        continue
                    slot = _check(file, name, part.get_dtype(), part.get_shape(), slots)
                    shards[file].append(Stored(name, slot))
                    filled[slot.parameter] += _count(slot.shape)
                    if name.endswith("embed_tokens.weight"):
                        stored_dtype = DTYPES[part.get_dtype()]
        coded: dict[str, Path] = {}
        if plan is not None:
            if gone := [name for name in plan.parts if name not in seen]:
                more = f" (and {len(gone) - 1} more)" if len(gone) > 1 else ""
                raise CheckpointError(
                    f"{path}: tensor {gone[0]} is missing, which quantization_config promises{more}"
                )
            coded = {name: seen[name] for name in plan.parts}
            plan.typed(scale_dtype or stored_dtype)
            for name in plan.groups:
                del filled[name]
        _check_filled(path, filled, seen, config)
        return cls(path, config, named or stored_dtype, shards, plan, coded)

    def fill(self, parameters: Mapping[str, Tensor]) -> None:
        """Copy what is stored of `parameters` into them (name -> tensor, any type, any device)."""
        for file, entries in self.shards.items():
            wanted = [entry for entry in entries if entry.slot.parameter in parameters]
            if wanted:
                self._copy(file, wanted, parameters)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One whole parameter, put together from its parts if the folder keeps it in parts.

        A quantized one is dequantized.
        """
        shape, dtype = weights.shapes(self.config)[name], dtype or self.dtype
        if self.plan is not None and name in self.plan.groups:
            matrix = self.plan.matrix(shape, self.plan.groups[name].form, dtype, "cpu")
            self.fill_matrices({name: matrix})
            return matrix.dense().mT.contiguous() if matrix.experts else matrix.dense()
        tensor = torch.empty(shape, dtype=dtype)
        for file, entries in self._places[name].items():
            self._copy(file, entries, {name: tensor})
        return tensor

    def fill_matrices(self, matrices: Mapping[str, Matrix]) -> None:
        """Read quantized weights into empty matrices (parameter -> matrix), file by file."""
        assert self.plan is not None
        by_file: dict[Path, dict[str, tuple[Part, list[str]]]] = {}
        for stored, (part, last) in self.plan.parts.items():
            if part.site.parameter in matrices:
                # All tensors of a linear are read from the file of its codes, or from their own.
                file = self._coded[stored]
                by_file.setdefault(file, {}).setdefault(part.name, (part, []))[1].append(last)
        held: dict[str, dict[str, Tensor]] = {}
        for file, parts in by_file.items():
            with opened(file) as shard:
                for name, (part, lasts) in parts.items():
                    tensors = held.pop(name, {})
                    for last in lasts:
                        tensors[last] = shard.get_tensor(f"{name}.{last}")
                    parameter = part.site.parameter
                    group = self.plan.groups[parameter]
                    if len(tensors) < len(group.expected(part.outputs, part.inputs)):
                        held[name] = tensors  # the rest is in another shard
                        continue
                    shape = tensors.get("weight_shape")
                    if shape is not None and shape.tolist() != [part.outputs, part.inputs]:
                        raise CheckpointError(
                            f"{file}: tensor {name}.weight_shape says {shape.tolist()}, the config "
                            f"needs {[part.outputs, part.inputs]}"
                        )
                    group.take(matrices[parameter], tensors, part.expert, part.rows)

    def _copy(self, file: Path, entries: list[Stored], parameters: Mapping[str, Tensor]) -> None:
        with opened(file) as shard, torch.no_grad():
            for entry in entries:
                view = entry.slot.view(parameters[entry.slot.parameter])
                view.copy_(shard.get_tensor(entry.name))


def opened(file: Path) -> Any:
    """`safe_open` whose complaints are CheckpointErrors naming the file and the first cut tensor."""
    try:
        return safe_open(file, framework="pt", device="cpu")
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as problem:
        raise CheckpointError(f"{file}: {_where_cut(file) or problem}") from problem


def read_config(path: Path) -> tuple[ModelConfig, torch.dtype | None, dict[str, Any] | None]:
    """(config, the type that config.json names or None, its quantization_config) of a folder."""
    file = path / "config.json"
    if not file.exists() and (path / "params.json").exists():
        raise CheckpointError(
            f"{path}: is in Meta's own format; convert it with: herdling import-meta {path} OUT"
        )
    raw = read_json(file, CheckpointError)
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: must be a JSON object")
    text = raw.get("text_config") or {}
    quantization = raw.get("quantization_config") or text.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise CheckpointError(f"{file}: quantization_config must be a JSON object")
    try:
        config = ModelConfig.from_hf(raw)
    except (ConfigError, TypeError) as problem:
        raise ConfigError(f"{file}: {problem}") from problem
    for holder in (raw, text):
        for key in ("dtype", "torch_dtype"):
            name = str(holder.get(key) or "").removeprefix("torch.")
            found = getattr(torch, name, None) if name else None
            if found in DTYPES.values():
                return config, found, quantization
    return config, None, quantization


def _shard_files(path: Path) -> dict[Path, set[str] | None]:
    """File -> names its index promises (None without an index), in order."""
    single, index = path / SINGLE, path / INDEX
    if single.exists() and index.exists():
        raise CheckpointError(f"{path}: holds both {SINGLE} and {INDEX}; remove the stale one")
    if single.exists():
        return {single: None}
    if not index.exists():
        other = next((p.name for p in sorted(path.glob("*")) if p.suffix in (".bin", ".pth")), "")
        hint = f" ({other} would have to be unpickled, which is not done)" if other else ""
        raise CheckpointError(f"{path}: has neither {SINGLE} nor {INDEX}{hint}")
    table = read_json(index, CheckpointError)
    table = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{index}: has no weight_map")
    files: dict[Path, set[str] | None] = {}
    for name, shard in sorted(table.items(), key=lambda item: str(item[1])):
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index}: {name} is said to be in {shard!r}, not a file name")
        if not (path / shard).exists():
            raise CheckpointError(f"{index}: {name} is said to be in {shard}, which is absent")
        names = files.setdefault(path / shard, set())
        assert names is not None
        names.add(name)
    return files


def _check_index(file: Path, expected: set[str] | None, found: set[str]) -> None:
    if expected is None:
        return
    if absent := sorted(expected - found):
        raise CheckpointError(f"{file}: tensor {absent[0]} is in the index but not in this file")
    if extra := sorted(found - expected):
        raise CheckpointError(
            f"{file}: tensor {extra[0]} is in this file but the index puts it elsewhere or nowhere"
        )


def _check(file: Path, name: str, dtype: str, shape: list[int], slots: dict[str, Slot]) -> Slot:
    """The slot of a stored tensor, or the error that says what is wrong with it."""
    if name not in slots:
        hint = nearest(name, slots)
        raise CheckpointError(f"{file}: tensor {name} is unexpected for this config{hint}")
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name} is stored as {dtype}; only float weights "
            f"({', '.join(DTYPES)}) can be opened, use the unquantized model"
        )
    if tuple(shape) != slots[name].shape:
        raise CheckpointError(
            f"{file}: tensor {name} has shape {list(shape)}, the config needs "
            f"{list(slots[name].shape)}"
        )
    return slots[name]


def _check_filled(
    path: Path, filled: dict[str, int], seen: dict[str, Path], config: ModelConfig
) -> None:
    """Every parameter is covered exactly once, be it whole or in parts."""
    gaps = {}
    for name, shape in weights.shapes(config).items():
        if name not in filled:  # quantized
            continue
        if filled[name] > _count(shape):
            raise CheckpointError(f"{path}: tensor {name} is there both fused and per expert")
        if filled[name] < _count(shape):
            gaps[name] = filled[name]
    if not gaps:
        return
    first, part = next(iter(gaps.items()))
    if part:  # some experts are there: name the one that is not
        slots = weights.per_expert(config)
        first = next(n for n, s in slots.items() if s.parameter == first and n not in seen)
    more = f" (and {len(gaps) - 1} more)" if len(gaps) > 1 else ""
    raise CheckpointError(f"{path}: tensor {first} is missing{more}")


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" for a tensor name close to a known one, else nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _where_cut(file: Path) -> str | None:
    """For a file shorter than its header says: the first tensor that is cut off."""
    size = file.stat().st_size
    with open(file, "rb") as handle:
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            return f"truncated within its header ({size} bytes)"
        try:
            header = json.loads(handle.read(length))
            ends = {n: v["data_offsets"][1] for n, v in header.items() if n != "__metadata__"}
        except (ValueError, LookupError, TypeError, AttributeError):
            return None  # broken rather than cut: the library's own words say how
    cut = sorted((end, name) for name, end in ends.items() if 8 + length + end > size)
    if not cut:
        return None
    whole = 8 + length + max(ends.values())
    return f"truncated: tensor {cut[0][1]} is cut off ({size} of {whole} bytes are there)"
