"""A LoRA adapter as a GGUF file: llama.cpp adds it while it runs, to every routed expert too.

llama.cpp computes W x + alpha / r * B (A x), with A (r, in) and B (out, r), an expert's own for fused
tensors, and one alpha for the file; whatever differs from alpha / r goes into B.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from herdling import lora
from herdling.checkpoint.folder import Folder
from herdling.errors import ConfigError
from herdling.export.gguf import limits
from herdling.export.gguf.text import tensor_names
from herdling.export.gguf.writing import Entry, Fields, file_type
from herdling.lora.layers import Factors
from herdling.model.llama import build
from herdling.model.sites import Site


def adapter(folder: Path | str, base: Folder, kind: str = "f32") -> tuple[Fields, list[Entry]]:
    """Metadata and tensors of a peft folder for a model folder, of which only headers are read.

    Raises ConfigError for what llama.cpp has no place for: DoRA, adapters of the vision part, and
    quantized types. CheckpointError for a folder that does not go with the base.
    """
    limits.check_text(base.config.text)
    if kind not in ("f32", "f16", "bf16"):
        raise ConfigError(f"type is {kind!r}; adapters are stored as f32, f16 or bf16")
    model = build(base.config, device="meta")
    factors = lora.load(model, folder, "adapter").factors("adapter")
    _check(folder, factors)
    alpha = next(iter(factors.values()))[1].alpha
    fields = {
        "general.architecture": "llama4",
        "general.type": "adapter",
        "general.file_type": file_type(kind),
        "general.name": Path(folder).resolve().name,
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    entries = []
    for name, (site, own) in factors.items():
        for theirs, A, B in pairs(name, site, own, alpha):
            entries.append(Entry(f"{theirs}.lora_a", tuple(A.shape), kind, lambda A=A: A))
            entries.append(Entry(f"{theirs}.lora_b", tuple(B.shape), kind, lambda B=B: B))
    return fields, entries


def pairs(name: str, site: Site, own: Factors, alpha: float) -> list[tuple[str, Tensor, Tensor]]:
    """(GGUF name, A (r, in), B (out, r)) of one matrix, with E in front for experts."""
    with torch.no_grad():
        A, B = own.A.float(), own.B.float() * (own.scale * own.r / alpha)
    names = tensor_names(name if site.fused else f"{name}.weight")
    if not site.fused:
        return [(names[0], A, B)]
    A, B = A.transpose(1, 2), B.transpose(1, 2)  # (E, r, in), (E, out, r)
    return [(theirs, A, part) for theirs, part in zip(names, B.chunk(len(names), 1), strict=True)]


def _check(folder: Path | str, factors: Mapping[str, tuple[Site, Factors]]) -> None:
    for name, (site, own) in factors.items():
        if site.kind in ("vision", "projector"):
            raise ConfigError(
                f"{folder}: adapts {name}, and llama.cpp adapts the decoder only; merge it into the "
                "model and export that"
            )
        if own.magnitude is not None:
            raise ConfigError(
                f"{folder}: is a DoRA adapter, which llama.cpp does not compute; merge it into the "
                "model and export that"
            )
