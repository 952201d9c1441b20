"""Herdling: the whole life of a Llama-4-style model, from tokenizer to chat.

Importing this package loads no torch; the names below are fetched on first use.
"""

from typing import TYPE_CHECKING, Any

from herdling.errors import Error

if TYPE_CHECKING:
    from herdling.infer.lm import LM, load, save
    from herdling.model.interop import accelerate_transformers

__version__ = "0.1.0"
__all__ = ["LM", "Error", "__version__", "accelerate_transformers", "load", "save"]

_HOME = {
    "LM": "herdling.infer.lm",
    "load": "herdling.infer.lm",
    "save": "herdling.infer.lm",
    "accelerate_transformers": "herdling.model.interop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'herdling' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
