"""The random generators of the process (python, numpy, torch on CPU and GPU) as plain state."""

import random
from typing import Any

import numpy as np
import torch


def seed(value: int) -> None:
    """Start all of them from one number; what a recipe does first."""
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002
    torch.manual_seed(value)


def state_dict() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    saved = np.random.get_state(legacy=False)  # noqa: NPY002 (the global generator)
    assert isinstance(saved, dict)
    numpy = {**saved["state"], "gauss": saved["gauss"], "has_gauss": saved["has_gauss"]}
    return {
        "python": [version, list(words), gauss],
        "numpy": numpy | {"key": torch.from_numpy(numpy["key"].astype(np.int64))},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def load_state_dict(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy = state["numpy"]
    words = numpy["key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, numpy["pos"], numpy["has_gauss"], numpy["gauss"]))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
