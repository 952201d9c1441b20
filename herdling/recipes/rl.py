"""Online RL on verifiable tasks: the model plays, is graded, and learns from the difference.

    herdling rl --model runs/chat/model --tasks count_shapes,calculator --out runs/rl --steps 200
    herdling rl --model runs/chat/model --tasks arithmetic:2,sorting --out runs/rl --steps 200 \\
        --curriculum uniform --policy.loss gspo --lora r=16
    herdling rl --model runs/chat/model --tasks count_shapes --examples tasks --out runs/rl --steps 200

Prompts come from the tasks' train items, text and pictures together; those of medium difficulty for
the present policy are asked most (docs/rl.md). Held-out accuracy is measured on validation items, and
RUN/report.html shows difficulty, reward and the sampler's distance from the trainer over time.
"""

from dataclasses import dataclass, field
from typing import Literal

from herdling.errors import ConfigError, at_least
from herdling.optim.config import AdamWConfig
from herdling.optim.schedule import Schedule
from herdling.recipes.settings import Training
from herdling.rollouts.config import FilterConfig
from herdling.train.config import OnlineConfig, PolicyConfig, RoutingConfig


@dataclass(frozen=True, kw_only=True)
class Config(Training):
    """Let a model play verifiable tasks and learn from its grades."""

    tasks: str
    """Names of tasks with commas between them, perhaps with weights, such as arithmetic:2,sorting."""
    curriculum: Literal["filtered", "uniform"] = "filtered"
    """Whether prompts are filtered to medium difficulty, again and again, or all asked alike."""
    online: OnlineConfig = field(default_factory=OnlineConfig)
    """How much is played between updates."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """How grades become a gradient."""
    filter: FilterConfig = field(default_factory=FilterConfig)
    """How prompts are filtered; `pool` counts for uniform too."""
    examples: str = ""
    """Tuning data learnt beside the rollouts, as --data of herdling sft, so that what is not played is
    not forgotten."""
    example_rows: int = 4
    """With --examples: rows of them beside every micro-batch of rollouts."""
    start_share: float = 0.0
    """Share of the starting weights in OUT/model: 0.4 leaves six tenths of every change, most of what was
    learnt and less of what was forgotten (docs/rl.md)."""
    sampler: Literal["same", "bf16"] = "same"
    """Weights that play: the trainer's own, or a copy of them in bfloat16."""
    optimizer: AdamWConfig = field(
        default_factory=lambda: AdamWConfig(learning_rate=2e-4, weight_decay=0.0)
    )
    """How the weights move; rates that suit examples unlearn more than rewards teach (docs/log.md)."""
    schedule: Schedule = field(default_factory=lambda: Schedule(kind="linear", warmup=5, final=0.0))
    """The learning rate over the run."""
    routing: RoutingConfig = field(default_factory=lambda: RoutingConfig(balance=1e-3))
    """How experts are kept busy."""
    evaluate_every: int = 50
    """Steps between two measurements on held-out items."""
    evaluate_items: int = 64
    """Held-out items of each task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, evaluate_every=1, evaluate_items=1, example_rows=1)
        if not 0 <= self.start_share < 1:
            raise ConfigError(f"start_share is {self.start_share}; it must be in [0, 1)")
        if self.start_share and (self.lora is not None or self.adapter or self.qat):
            raise ConfigError(
                f"start_share is {self.start_share}, which averages plain weights; remedy: leave it out "
                "with --lora, --adapter and --qat"
            )


def main(config: Config) -> int:
    from herdling.recipes.rl_run import train

    train(config)
    return 0
