"""A GGUF file, written one tensor at a time and read back.

Numbers are laid out by the `gguf` library. Quantized types go along the last axis in blocks of 32;
a matrix that is not a multiple of 32 wide, a norm and a router stay in floats.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from herdling.errors import CheckpointError, ConfigError, require
from herdling.files import atomic_file

TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
"""Types of a file, with the number that `general.file_type` has for them."""
BLOCK = 32

Fields = Mapping[str, Any]
"""Metadata: int is stored as uint32, float as float32, lists as arrays."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, read only when it is its turn."""

    name: str
    shape: tuple[int, ...]
    """As torch has it; the file lists it backwards."""
    kind: str
    """One of `TYPES`."""
    read: Callable[[], Tensor]
    coded: bool = False
    """Whether the numbers may lie on a grid of 16 levels already, which q4_0 then keeps exactly."""


def file_type(kind: str) -> int:
    """The number of a type; ConfigError for an unknown one."""
    if kind not in TYPES:
        raise ConfigError(f"type is {kind!r}; there are {', '.join(TYPES)}")
    return TYPES[kind]


def kind_for(shape: Sequence[int], wanted: str) -> str:
    """The type of a matrix in a file of type `wanted`: f16 where its rows are no whole blocks."""
    return "f16" if wanted.startswith("q") and shape[-1] % BLOCK else wanted


def write(path: Path | str, fields: Fields, entries: Sequence[Entry]) -> dict[str, int]:
    """Write a file whole or not at all, read it back, and return the bytes in each type.

    One tensor is in memory at a time. Raises CheckpointError where a tensor holds numbers that its
    type cannot, or where the file reads back differently; then nothing is kept.
    """
    gguf = require("gguf", "gguf")
    with atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, fields["general.architecture"])
        for key, value in fields.items():
            if key != "general.architecture":
                _add(writer, key, value)
        for entry in entries:
            kind = gguf.GGMLQuantizationType[entry.kind.upper()]
            nbytes = _row_bytes(gguf, entry) * int(np.prod(entry.shape[:-1], dtype=np.int64))
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), nbytes, kind)
        total: dict[str, int] = {}
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for entry in entries:
                data = _encoded(entry)
                writer.write_tensor_data(data)
                total[entry.kind] = total.get(entry.kind, 0) + data.nbytes
        finally:
            writer.close()
        _compare(gguf, temporary, fields, entries)
    return total


def encode(tensor: Tensor, kind: str, coded: bool = False) -> np.ndarray:
    """The bytes of a tensor in a type, uint8 with the bytes of a row along the last axis."""
    gguf = require("gguf", "gguf")
    if kind in _FLOATS:
        tensor = tensor.to(_FLOATS[kind]).contiguous()
        return tensor.reshape(*tensor.shape[:-1], -1).view(torch.uint8).numpy()
    quantized = gguf.GGMLQuantizationType[kind.upper()]
    if tensor.dim() == 3:  # expert by expert, so that float32 copies stay small
        return np.stack([encode(one, kind, coded) for one in tensor])
    numbers = tensor.float().contiguous().numpy()
    data = gguf.quants.quantize(numbers, quantized)
    if coded and kind == "q4_0":
        _keep_grid(numbers.reshape(-1, BLOCK), data.reshape(-1, 2 + BLOCK // 2))
    return data


def _keep_grid(x: np.ndarray, blocks: np.ndarray) -> None:
    """Write the blocks (n, 18) anew whose numbers (n, 32) are integers of -8..7 times one float16.

    The format's own rule makes the largest magnitude a -8, and so moves a grid that ends elsewhere.
    """
    top = np.abs(x).max(1)
    left = np.flatnonzero(top > 0)
    for most in range(8, 0, -1):
        scale = (top[left] / most).astype(np.float16)
        wide = scale.astype(np.float32)[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            codes = np.rint(x[left] / wide)
        fits = ((codes * wide == x[left]) & (codes >= -8) & (codes < 8)).all(1)
        own, found = left[fits], (codes[fits] + 8).astype(np.uint8)
        blocks[own, :2] = scale[fits, None].view(np.uint8)
        blocks[own, 2:] = found[:, : BLOCK // 2] | found[:, BLOCK // 2 :] << 4
        left = left[~fits]


_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def _encoded(entry: Entry) -> np.ndarray:
    tensor = entry.read()
    if tuple(tensor.shape) != entry.shape:
        raise CheckpointError(f"{entry.name} is {list(tensor.shape)}, expected {list(entry.shape)}")
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{entry.name} holds NaN or infinite numbers; nothing is written")
    # Scales of blocks are float16 too: numbers up to 65504 * 8 would do, but no weights are like that.
    if entry.kind not in ("f32", "bf16") and float(tensor.abs().max()) > 65504:
        raise CheckpointError(
            f"{entry.name} holds {float(tensor.abs().max()):.3g}, beyond {entry.kind}; "
            "remedy: --type bf16 or f32"
        )
    return encode(tensor, entry.kind, entry.coded)


def _row_bytes(gguf: Any, entry: Entry) -> int:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[entry.kind.upper()]]
    return entry.shape[-1] // block * size


def _add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string"}
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def _compare(gguf: Any, path: Path, fields: Fields, entries: Sequence[Entry]) -> None:
    reader = gguf.GGUFReader(path)
    for key, value in fields.items():
        stored = reader.fields[key].contents() if key in reader.fields else None
        wanted = np.float32(value) if isinstance(value, float) else value
        if stored != wanted:
            raise CheckpointError(f"{path}: {key} reads back as {stored!r}, not {value!r}")
    found = {tensor.name: tensor for tensor in reader.tensors}
    for entry in entries:
        tensor = found.pop(entry.name, None)
        if tensor is None or tuple(reversed(tensor.shape.tolist())) != entry.shape:
            raise CheckpointError(f"{path}: {entry.name} is missing or of another shape")
        if tensor.tensor_type.name.lower() != entry.kind or not np.array_equal(
            tensor.data.reshape(-1).view(np.uint8), _encoded(entry).reshape(-1)
        ):
            raise CheckpointError(f"{path}: {entry.name} reads back differently; nothing kept")
    if found:
        raise CheckpointError(f"{path}: holds {sorted(found)[0]}, which was not written")
