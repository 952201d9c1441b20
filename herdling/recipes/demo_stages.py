"""The stages of `herdling demo` as settings of their recipes: what is trained on, how long, how fast.

dpo.train(demo_stages.preferring(demo_stages.Config(out=Path("runs/demo"))))    # one of them again
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from herdling.errors import at_least
from herdling.optim.config import AdamWConfig
from herdling.optim.schedule import Schedule
from herdling.recipes import dpo, rl
from herdling.recipes.settings import Stage
from herdling.tasks.registry import PREFERENCE_TASKS
from herdling.train.config import CheckpointConfig, OnlineConfig, PreferenceConfig, RoutingConfig

TASKS = ("read_number", "count_shapes", "locate_shape", "shape_colour", "largest_bar",
         "cldr_names", "languages", "arithmetic")  # fmt: skip
PRETRAIN = (
    "code:1,english:1,multilingual:1,picture/number:4,picture/scene:3,picture/chart:1,"
    "read_number:1,count_shapes:0.5,locate_shape:1,shape_colour:1,largest_bar:0.5,"
    "cldr_names:1.5,languages:1,arithmetic:2"
)
TUNE = (
    "read_number:3,count_shapes:1,locate_shape:2,shape_colour:2,largest_bar:1,"
    "cldr_names:1.5,languages:1,arithmetic:2.5"
)
MANNERS = ",refusals:0.5,tone:0.5,form:0.5"
"""What tuning also shows where preferences follow."""
PLAY = "count_shapes,largest_bar"
"""Few, as each needs hundreds of useful groups before rewards move more than chance does; not sums and
names: their train items are known by heart, and playing them teaches nothing new (docs/log.md)."""
PREFER = "refusals,tone,form"
OWN = "count_shapes,locate_shape,shape_colour,largest_bar,cldr_names,languages"
"""Tasks of which the preference stage also compares the model's own right and wrong answers."""
STAGES = ("pretrain", "tune", "rl", "dpo")
RATES = ("vision_model*=0.33", "multi_modal_projector*=0.33")
"""At the decoder's rate the encoder never begins to read (docs/log.md)."""


@dataclass(frozen=True)
class Config:
    """Train a tiny multimodal model on built-in data, from tokenizer to report."""

    out: Path = Path("runs/demo")
    """Folder for everything: RUN/model is the result, RUN/report.html tells the story."""
    preset: Literal["tiny", "nano"] = "tiny"
    """Size of the model: tiny, or nano for a quick look."""
    pretrain_steps: int = 1150
    """Optimizer steps of joint pretraining."""
    tune_steps: int = 600
    """Optimizer steps of instruction tuning."""
    rl_steps: int = 150
    """Optimizer steps of online RL; 0 leaves it out."""
    dpo_steps: int = 40
    """Optimizer steps of preference training on 16 pairs each; 0 leaves it out."""
    rows: int = 8
    """Rows in a batch."""
    length: int = 256
    """Tokens in a row."""
    learning_rate: float = 1.5e-3
    """Peak of pretraining for the decoder; pictures get a third of it, tuning half."""
    items: int = 300
    """Held-out items of each task."""
    seed: int = 0
    """Decides weights and data order."""

    def __post_init__(self) -> None:
        at_least(
            self, pretrain_steps=1, tune_steps=1, rl_steps=0, dpo_steps=0, rows=1, length=2, items=1
        )
        _optimizer(self, 1.0)  # a rate that cannot be, before any work

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that are run."""
        return tuple(name for name in STAGES if getattr(self, f"{name}_steps") > 0)

    @property
    def tasks(self) -> tuple[str, ...]:
        """What is asked in examinations."""
        return (*TASKS, *(PREFERENCE_TASKS if self.dpo_steps else ()))


def pretraining(config: Config) -> Stage:
    return Stage(
        model=config.preset,
        tokenizer=config.out / "tokenizer",
        data=PRETRAIN,
        out=config.out / "pretrain",
        steps=config.pretrain_steps,
        rows=config.rows,
        length=config.length,
        optimizer=_optimizer(config, 1.0),
        schedule=Schedule(kind="wsd", warmup=100, decay=0.2, final=0.5),
        routing=RoutingConfig(balance=0.01),
        checkpoint=CheckpointConfig(every=200, keep=1),
        seed=config.seed,
        resume=True,
    )


def tuning(config: Config) -> Stage:
    return replace(
        pretraining(config),
        model=str(config.out / "pretrain" / "model"),
        tokenizer=None,
        data=TUNE + (MANNERS if config.dpo_steps else ""),
        out=config.out / "tune",
        steps=config.tune_steps,
        optimizer=_optimizer(config, 1 / 2),
        schedule=Schedule(kind="linear", warmup=50, final=0.0),
        # Other items of the same tasks than pretraining read.
        seed=config.seed + 1,
    )


def playing(config: Config) -> rl.Config:
    return rl.Config(
        model=str(config.out / "tune" / "model"),
        tasks=PLAY,
        out=config.out / "rl",
        steps=config.rl_steps,
        online=OnlineConfig(prompts=16, samples=8, max_tokens=24, length=config.length),
        examples=TUNE + (MANNERS if config.dpo_steps else ""),
        example_rows=4,
        start_share=0.4,
        optimizer=_optimizer(config, 2 / 15, decay=0.0),
        schedule=Schedule(kind="linear", warmup=5, final=0.0),
        checkpoint=CheckpointConfig(every=40, keep=1),
        evaluate_every=max(1, config.rl_steps),
        evaluate_items=min(50, config.items),
        seed=config.seed + 2,
        resume=True,
    )


def preferring(config: Config) -> dpo.Config:
    return dpo.Config(
        model=str(config.out / ("rl" if config.rl_steps else "tune") / "model"),
        data=PREFER,
        rollouts=OWN,
        rollout_share=0.35,
        tries=4,
        out=config.out / "dpo",
        steps=config.dpo_steps,
        pairs=16 * config.dpo_steps,
        batch=16,
        length=config.length,
        max_tokens=24,
        preference=PreferenceConfig(beta=0.1, sft=0.2),
        # Five times as fast costs names and forms 5 to 8 points (docs/log.md).
        optimizer=_optimizer(config, 1 / 75, decay=0.0),
        schedule=Schedule(kind="linear", warmup=0.1),
        checkpoint=CheckpointConfig(every=20, keep=1),
        seed=config.seed + 3,
        resume=True,
    )


def _optimizer(config: Config, share: float, decay: float = 0.05) -> AdamWConfig:
    rate = config.learning_rate * share
    return AdamWConfig(learning_rate=rate, weight_decay=decay, rates=RATES)
