"""Supervised fine-tuning: next token on conversations, with loss on the assistant's turns only.

    herdling sft --model runs/base/model --data tasks --out runs/chat --steps 500
    herdling sft --model runs/base/model --data 'chats/*.jsonl:3,tasks' --out runs/chat --steps 500

Conversations are JSON lines with `messages` in OpenAI form (images and tools included), or built-in
tasks by name; whole conversations are packed into rows and never see each other.
"""

from dataclasses import dataclass, field

from herdling.optim.adamw import AdamWConfig
from herdling.recipes import stage
from herdling.tasks.mixture import makers


@dataclass(frozen=True, kw_only=True)
class Config(stage.Stage):
    """Tune a model on conversations."""

    data: str = "tasks"
    """What to train on, with weights: tasks, task names, JSON lines of conversations."""
    optimizer: AdamWConfig = field(default_factory=lambda: AdamWConfig(learning_rate=3e-4))
    """How the weights move."""


def main(config: Config) -> int:
    stage.run(config, "sft", makers())
    return 0
