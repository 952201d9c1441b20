"""Learning from preferences: of two answers to a question, make the better one likelier.

    herdling dpo --model runs/rl/model --data preferences --out runs/dpo --steps 64
    herdling dpo --model runs/rl/model --data 'pairs.jsonl:3,preferences' --out runs/dpo --steps 200

Pairs are JSON lines with `prompt`, `chosen` and `rejected` (text, or messages in OpenAI form, images
and tools included), built-in tasks, or answers of the model itself (`--rollouts`). The model as it is
at the start is the reference; it reads each answer once, before training:

    RUN/reference.safetensors    log-probabilities of every answer, and what they were computed on
    RUN/rollouts.jsonl           with --rollouts: pairs of the model's own answers
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from herdling.errors import ConfigError, at_least
from herdling.optim.config import AdamWConfig
from herdling.optim.schedule import Schedule
from herdling.recipes.settings import Training
from herdling.train.config import PreferenceConfig

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Config(Training):
    """Learn from pairs of a better and a worse answer."""

    data: str = "preferences"
    """What to learn from, with weights: preferences, task names, files of pairs."""
    pairs: int = 512
    """How many pairs at most; each of a file's is taken once."""
    batch: int = 16
    """Pairs in a micro-batch of one process."""
    length: int = 512
    """Tokens in a row; a question and its answer must fit."""
    split: Literal["train", "all"] = "train"
    """Which part of files to train on; all leaves nothing to test on."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """What a byte of your files that is not UTF-8 does: stop the run, or become U+FFFD."""
    rollouts: str | None = None
    """Tasks, perhaps with weights, that the model plays first: its right answers beside its wrong ones."""
    rollout_share: float = 0.5
    """With --rollouts: their share of the pairs."""
    tries: int = 8
    """With --rollouts: answers to each prompt."""
    max_tokens: int = 64
    """With --rollouts: most tokens of an answer."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """How an answer is preferred to another."""
    without: Literal["none", "format", "shared"] = "format"
    """Tokens that do not count: none, format (control tokens), or shared (also words both begin or end
    with)."""
    optimizer: AdamWConfig = field(
        default_factory=lambda: AdamWConfig(learning_rate=3e-6, weight_decay=0.0)
    )
    """How the weights move; a hundredth of tuning's rate is usual for large models."""
    schedule: Schedule = field(default_factory=lambda: Schedule(kind="linear", warmup=0.1))
    """The learning rate over the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, pairs=1, batch=1, length=1, max_tokens=1)
        if not 0 < self.rollout_share < 1:
            raise ConfigError(f"rollout_share is {self.rollout_share}; it must be between 0 and 1")
        if self.tries < 2:
            raise ConfigError(f"tries is {self.tries}; it must be at least 2")


def main(config: Config) -> int:
    train(config)
    return 0


def train(config: Config, name: str = "dpo") -> "nn.Module":
    """Train, save OUT/model, return the model. Stopped runs resume exactly with `resume`."""
    from herdling.recipes.dpo_run import train

    return train(config, name)
