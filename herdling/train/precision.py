"""The names of `--precision`: what the matrix products of a run are made of."""

from typing import Literal, get_args

Low = Literal["fp8", "fp8_rowwise", "mxfp8", "mxfp6", "mxint8", "mxfp4w_mxfp6", "mxfp4"]
"""Recipes of `quant.low_precision`, in the blocks; all other products are bfloat16."""
Precision = Literal["fp32", "bf16", "fp16"] | Low
LOW: tuple[str, ...] = get_args(Low)
