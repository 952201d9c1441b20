"""Learning from preferences: of two answers to a question, make the better one likelier.

    herdling dpo --model runs/rl/model --data preferences --out runs/dpo --steps 64
    herdling dpo --model runs/rl/model --data 'pairs.jsonl:3,preferences' --out runs/dpo --steps 200

Pairs are JSON lines with `prompt`, `chosen` and `rejected` (text, or messages in OpenAI form, images
and tools included), built-in tasks, or answers of the model itself (`--rollouts`). The model as it is
at the start is the reference; it reads each answer once, before training:

    RUN/reference.safetensors    log-probabilities of every answer, and what they were computed on
    RUN/rollouts.jsonl           with --rollouts: pairs of the model's own answers
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from herdling import distributed
from herdling.data.pair_loader import PairLoader
from herdling.data.preferences import PairSource, RecordPairs, Shared, open_pairs
from herdling.data.records import JsonLines
from herdling.data.spec import Opening, parse
from herdling.errors import ConfigError
from herdling.files import atomic_file
from herdling.infer.lm import load
from herdling.metrics import Progress
from herdling.optim.adamw import AdamWConfig
from herdling.optim.schedule import Schedule
from herdling.recipes.training import Run, Training, at_least_one
from herdling.rollouts.pairs import write_pairs
from herdling.tasks.preferences import makers
from herdling.tasks.registry import open_task
from herdling.train.preference import PreferenceConfig, PreferenceLoss, answers, pairs


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
    without: Shared = "format"
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
        at_least_one(self, "pairs", "batch", "length", "max_tokens")
        if not 0 < self.rollout_share < 1:
            raise ConfigError(f"rollout_share is {self.rollout_share}; it must be between 0 and 1")
        if self.tries < 2:
            raise ConfigError(f"tries is {self.tries}; it must be at least 2")


def main(config: Config) -> int:
    train(config)
    return 0


def train(config: Config, name: str = "dpo") -> nn.Module:
    """Train, save OUT/model, return the model. Stopped runs resume exactly with `resume`."""
    run = Run(config, name)
    opening = Opening(
        run.tok, config.split, config.seed, config.length, run.processor, config.encoding_errors
    )
    sources = open_pairs(config.data, opening, makers())
    if config.rollouts is not None:
        total = sum(weight for _, weight in sources)
        share = config.rollout_share
        sources.append((_own_pairs(config, config.rollouts, opening), total * share / (1 - share)))
    loader = PairLoader(
        sources,
        run.tok,
        count=config.pairs,
        batch_size=config.batch,
        length=config.length,
        without=config.without,
        seed=config.seed,
        rank=distributed.rank(),
        world=distributed.world_size(),
    )
    if distributed.is_main():
        shares = ", ".join(f"{of} {share:.0%}" for of, share in loader.shares().items())
        print(f"{len(loader)} pairs ({shares}), {loader.skipped} too long")
    if config.preference.needs_reference:
        loader.reference = reference(run, loader, config.out / "reference.safetensors")
    run.fit(loader, PreferenceLoss(config.preference), weight=pairs)
    return run.save(data=list(loader.shares()), note=f"{len(loader)} pairs")


def _own_pairs(config: Config, tasks: str, opening: Opening) -> PairSource:
    """The model's own answers, from OUT/rollouts.jsonl if it is there."""
    path = config.out / "rollouts.jsonl"
    side = None if opening.processor is None else opening.processor.size
    if distributed.is_main() and not path.exists():
        given = write_pairs(
            load(config.model),
            [(open_task(name, opening.seed, side), weight) for name, weight in parse(tasks)],
            path,
            count=max(1, round(config.pairs * config.rollout_share)),
            tries=config.tries,
            max_tokens=config.max_tokens,
        )
        print("pairs of the model's own: " + ", ".join(f"{n} {c}" for n, c in given.items()))
    distributed.barrier()
    return RecordPairs("rollouts", JsonLines([path]), opening.tok, opening.processor)


def reference(run: Run, loader: PairLoader, path: Path) -> Tensor:
    """Log-probabilities of all answers under the untrained model, (pairs, 2), from `path` if it has them.

    The file says which pairs and which weights it was computed on; one of others is written anew.
    """
    key = f"{loader.digest} {_fingerprint(run.model)} {run.config.precision}"
    found = _cached(path, key)
    if found is not None:
        return found
    model, batch_size = run.model.to(run.accelerator.device).eval(), loader.batch_size
    places = range(0, len(loader), batch_size)[distributed.rank() :: distributed.world_size()]
    mine: list[tuple[int, list[list[float]]]] = []
    progress = Progress("reference", len(places), show=distributed.is_main())
    with progress, torch.no_grad(), run.accelerator.autocast():
        for done, first in enumerate(places):
            batch = loader.batch(range(first, min(first + batch_size, len(loader))))
            batch = {k: v.to(run.accelerator.device) for k, v in batch.items()}
            mine.append((first, answers(model, batch).log_probs.view(-1, 2).tolist()))
            progress.update(done + 1, "")
    every = sorted(part for of_rank in distributed.gather(mine) for part in of_rank)
    table = torch.tensor([pair for _, part in every for pair in part], dtype=torch.float32)
    if distributed.is_main():
        with atomic_file(path) as temporary:
            save_file({"log_probs": table}, temporary, metadata={"key": key})
    distributed.barrier()
    return table


def _cached(path: Path, key: str) -> Tensor | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("log_probs") if file.metadata()["key"] == key else None
    except (SafetensorError, OSError, KeyError, TypeError):
        return None  # cut short or another's: computing it again costs one pass


def _fingerprint(model: nn.Module) -> str:
    """The weights as one word: their sums in float64, by name."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        digest.update(f"{name}={parameter.detach().double().sum().item()!r};".encode())
    return digest.hexdigest()
