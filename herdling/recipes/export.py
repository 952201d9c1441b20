"""From a model folder to another format, read back and compared before it says done.

Run: herdling export PATH OUT --to hf [--dtype bfloat16]
     herdling export PATH OUT --to meta [--model-parallel 8]
     herdling export PATH OUT.gguf --to gguf [--type q8_0]
     herdling export ADAPTER OUT.gguf --to gguf [--base PATH]
`hf` writes the canonical folder: fused experts, current config spelling, shards with an index.
`meta` writes consolidated.NN.pth and params.json. `gguf` writes a file for llama.cpp; the vision part
of a model goes to `mmproj-OUT.gguf` beside it. Left out: compressed-tensors, which `quantize` writes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Config:
    """Write a model in another format, and compare it after re-loading."""

    path: Annotated[Positional[str], arg(metavar="MODEL")]
    """Model folder or hub name."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """Folder to write: new, empty, or a model folder to be replaced. For gguf a file, NAME.gguf."""
    to: str
    """Target format: hf, meta or gguf."""
    dtype: str | None = None
    """For hf and meta: stored type (float32, bfloat16, float16); default: the folder's own."""
    model_parallel: int = 1
    """For meta: how many files each tensor is cut over."""
    type: str | None = None
    """For gguf: f32, f16, bf16, q8_0 or q4_0; default: the folder's own type, f32 for an adapter."""
    base: str | None = None
    """For gguf, where PATH is an adapter: its model; default: the one that its config names."""


def main(config: Config) -> None:
    """Export and compare. Raises ConfigError for an unknown target or an OUT that holds other things,
    CheckpointError otherwise.
    """
    from herdling.recipes.export_run import run

    run(config)
