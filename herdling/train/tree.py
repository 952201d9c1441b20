"""State dicts on disk without pickle: nested mappings as JSON, their tensors in safetensors.

Two files, STEM.json and STEM.safetensors; in the JSON a tensor stands as {"$tensor": its name}.
Tuples come back as lists.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from herdling.errors import CheckpointError
from herdling.files import read_json

_MARK = "$tensor"


def save_tree(folder: Path, stem: str, tree: Any) -> None:
    """Write a tree of mappings with string keys, lists, JSON values and tensors."""
    tensors: dict[str, Tensor] = {}
    plain = _split(tree, "", tensors)
    (folder / f"{stem}.json").write_text(json.dumps(plain, allow_nan=False) + "\n", "utf-8")
    save_file(tensors, folder / f"{stem}.safetensors")


def load_tree(folder: Path, stem: str) -> Any:
    """Read what `save_tree` wrote, tensors on the CPU; raises CheckpointError naming the file."""
    plain = read_json(folder / f"{stem}.json", CheckpointError)
    return _join(plain, load_tensors(folder / f"{stem}.safetensors"))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises CheckpointError where it is missing or cut short."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as problem:
        raise CheckpointError(f"{path}: cannot be read: {problem}") from None


def _split(value: Any, at: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[at] = value.detach().cpu().contiguous().clone()
        return {_MARK: at}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or key == _MARK:
                raise TypeError(f"state {at or 'tree'} has the key {key!r}; keys must be strings")
        return {k: _split(v, f"{at}/{k}" if at else k, tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_split(v, f"{at}/{i}" if at else str(i), tensors) for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"state {at} is a {type(value).__name__}; use numbers, strings and tensors")


def _join(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_MARK}:
            return tensors[value[_MARK]]
        return {k: _join(v, tensors) for k, v in value.items()}
    return [_join(v, tensors) for v in value] if isinstance(value, list) else value
