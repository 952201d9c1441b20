"""What `--format` and `quantize=` name: a weight format, a format for activations, and where they go.

    scheme("w4a8"), scheme("mxfp4"), scheme("meta-int4"), scheme("int4_g128", divisor=8)

Kinds are those of adapters (`model.sites`). Norms and embeddings are no products, the router decides on
differences of logits, the encoder of pictures is small: all stay as they are.
"""

from dataclasses import dataclass, replace
from typing import Any

from herdling.errors import ConfigError
from herdling.quant.formats import FORMATS, Format, changed, format_of

PRODUCTS = ("attention", "shared", "experts", "dense")
"""All matrices of the blocks: 98 % of Scout."""


@dataclass(frozen=True)
class Scheme:
    """How a whole model is quantized."""

    name: str
    weights: Format
    activations: Format | None = None
    """Of what enters each product, one scale a token, made anew for each call; None: as it comes."""
    kinds: tuple[str, ...] = PRODUCTS
    skip_ends: bool = False
    """Leave the first and the last layer as they are."""


_INT8_TOKENS = format_of("int8", divisor=127.0)
_FP8_TOKENS = format_of("fp8_e4m3")

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("w8a8", format_of("int8"), _INT8_TOKENS),
        Scheme("w4a8", format_of("int4_g32"), _INT8_TOKENS),
        Scheme("int4", format_of("int4_g32")),
        Scheme("fp8", format_of("fp8_e4m3"), _FP8_TOKENS),
        Scheme("mxfp8", format_of("mxfp8_e4m3")),
        Scheme("mxfp6", format_of("mxfp6_e2m3")),
        Scheme("mxfp4", format_of("mxfp4_e2m1")),
        # Experts only: all else is small, and suffers.
        Scheme("ternary", format_of("ternary"), kinds=("experts",)),
        # Both as in Meta's own loader (llama-models, llama4/quantization/loader.py).
        Scheme(
            "meta-int4", format_of("int4_g128", divisor=8.0, least=1e-6), kinds=("experts", "shared")
        ),
        Scheme(
            "meta-fp8", format_of("fp8_e4m3"), replace(_FP8_TOKENS, bound=1200.0), ("experts",), True
        ),
    )
}  # fmt: skip


def scheme(name: str, **options: Any) -> Scheme:
    """A scheme by name; any format is one for weights alone. `options` change the weights' format."""
    if name in SCHEMES:
        found = SCHEMES[name]
        return replace(found, weights=changed(found.weights, **options)) if options else found
    if name in FORMATS:
        return Scheme(name, format_of(name, **options))
    raise ConfigError(f"no format {name!r}; there are: {', '.join(SCHEMES | FORMATS)}")
