"""`herdling quantize`: a model folder with fewer bits a weight, one block in memory at a time.

    herdling quantize runs/demo/model runs/demo/w4a8 --format w4a8
    herdling quantize runs/demo/model runs/demo/int4 --format int4 --method gptq --data tasks,builtin

The result is a compressed-tensors folder: chat, serve, evaluate and `herdling.load` take it like any
other, transformers opens it, and vLLM knows the layouts. Before it says done it opens what it wrote and
compares logits. Left out: pictures in calibration.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Config:
    """Write a model with fewer bits a weight, and compare it after re-loading."""

    path: Annotated[Positional[str], arg(metavar="MODEL")]
    """Model folder or hub name."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """Folder to write: new, empty, or a model folder to be replaced."""
    format: str
    """w4a8 w8a8 int4 int8 fp8 mxfp8 mxfp6 mxfp4 ternary meta-int4 meta-fp8, or a format such as int4_g128."""
    group: int | None = None
    """Inputs that share a scale, where that is not the format's own."""
    targets: str = ""
    """What to quantize, with commas: attention shared experts dense head vision projector, or patterns
    over names; default: all products of the decoder's blocks, or what the format is meant for."""
    method: Literal["nearest", "gptq", "awq"] = "nearest"
    """nearest: rounding alone; gptq: errors put on other weights; awq: large inputs get finer steps."""
    data: str = "builtin"
    """What gptq and awq calibrate with, as `--data` of training; text of its training split."""
    tokens: int = 16384
    """Tokens to calibrate with."""
    length: int = 256
    """Tokens of a row of them."""
    all_experts: bool = False
    """Show every expert all calibration tokens, not only those that chose it."""
    seed: int = 0
    """Which calibration tokens are drawn."""
    dtype: str | None = None
    """Type of what stays plain (float32, bfloat16, float16); default: the folder's own."""
    shard_bytes: int = 4_000_000_000
    """Most bytes of a file of the result."""
    json: Path | None = None
    """Also write what was measured to this file."""


def main(config: Config) -> None:
    """Quantize, compare, print the coverage. ConfigError for what cannot be, CheckpointError for what
    did not come out right; nothing is kept then.
    """
    from herdling.recipes.quantize_run import run

    run(config)
