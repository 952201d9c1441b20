"""From Meta's own checkpoint format to a model folder.

Run: herdling import-meta PATH OUT [--tokenizer FILE_OR_FOLDER] [--dtype bfloat16]
PATH holds consolidated.NN.pth (any number of them), params.json, and usually tokenizer.model. One
parameter is in memory at a time, and the result is read back and compared before it says done.
Left out: the FP8 and int4 releases (a clear error), and the older vision position table.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Config:
    """Turn Meta's consolidated checkpoint files into a model folder."""

    path: Annotated[Positional[Path], arg(metavar="PATH")]
    """Folder with consolidated.NN.pth and params.json."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """The model folder to write: new, empty, or a model folder to be replaced."""
    tokenizer: Path | None = None
    """A tokenizer.model, or a folder with tokenizer.json; by default looked for in PATH."""
    max_positions: int | None = None
    """Longest context to note down; params.json does not say. Default: the instruct releases'."""
    dtype: str | None = None
    """Stored type (float32, bfloat16, float16); default: as it is."""
    llama: bool = True
    """Whether these are Meta's weights, so that the card says the duties; a card in PATH knows better."""


def main(config: Config) -> None:
    """Convert, write atomically, read back, compare. Raises CheckpointError or ConfigError."""
    from herdling.recipes.import_meta_run import run

    run(config)
