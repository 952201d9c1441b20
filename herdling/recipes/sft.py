"""Supervised fine-tuning: next token on conversations, with loss on the assistant's turns only.

    herdling sft --model runs/base/model --data tasks --out runs/chat --steps 500
    herdling sft --model runs/base/model --data 'chats/*.jsonl:3,tasks' --out runs/chat --steps 500

Conversations are JSON lines with `messages` in OpenAI form (images and tools included), or built-in
tasks by name; whole conversations are packed into rows and never see each other. With `--judge` only
what a model finds hard is trained on (herdling.eval.judge says which models can judge).
"""

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from herdling.errors import at_least
from herdling.optim.config import AdamWConfig
from herdling.recipes.settings import Stage

if TYPE_CHECKING:
    from herdling.data.spec import Weighted
    from herdling.recipes.training import Run


@dataclass(frozen=True, kw_only=True)
class Config(Stage):
    """Tune a model on conversations."""

    data: str = "tasks"
    """What to train on, with weights: tasks, task names, JSON lines of conversations."""
    optimizer: AdamWConfig = field(default_factory=lambda: AdamWConfig(learning_rate=3e-4))
    """How the weights move."""
    judge: str | None = None
    """Who says which examples are hard: a model folder, loss:FOLDER, pass:FOLDER, a URL#MODEL, or random."""
    keep: str = "hard:0.5"
    """With --judge: what share of the pool to train on."""
    pool: int = 4096
    """With --judge: how many examples are rated, at most all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, pool=1)
        from herdling.recipes.judged import parse_keep

        parse_keep(self.keep)


def main(config: Config) -> int:
    train(config)
    return 0


def train(config: Config, name: str = "sft") -> None:
    """Tune, on the part that the judge leaves where there is one; save OUT/model."""
    from herdling.recipes import stage
    from herdling.tasks.mixture import makers

    choose = None if config.judge is None else partial(_hard, config, config.judge)
    stage.run(config, name, makers(), choose=choose)


def _hard(config: Config, judge: str, run: "Run", sources: "Weighted") -> "tuple[Weighted, str]":
    from herdling.recipes.judged import keep_part

    return keep_part(sources, judge, config.keep, config.pool, run.tok, config.seed, config.out)
