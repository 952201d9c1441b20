"""A toy tokenizer, trained once on a few of Python's own sources."""

import sysconfig
from pathlib import Path

import pytest

from herdling.inputs.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def texts() -> list[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [(folder / name).read_text("utf-8") for name in ("ast.py", "textwrap.py", "this.py")]


@pytest.fixture(scope="session")
def tok(texts: list[str]) -> Tokenizer:
    return Tokenizer.train(texts, vocab_size=1024)
