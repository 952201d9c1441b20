"""The work of `herdling rl`: play, learn, measure on held-out items, write the report.

`herdling.recipes.rl` has the settings.
"""

import copy
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from herdling.data import spec
from herdling.errors import ConfigError, require
from herdling.eval import report
from herdling.eval.harness import evaluate
from herdling.files import read_json, write_json
from herdling.infer.engine import Engine
from herdling.infer.lm import LM
from herdling.metrics import METRICS, read
from herdling.recipes.rl import Config
from herdling.recipes.stage import load
from herdling.recipes.training import Run
from herdling.tasks.base import Task
from herdling.tasks.mixture import makers
from herdling.tasks.registry import open_task
from herdling.train.loop import Every
from herdling.train.online import Online
from herdling.train.policy import PolicyLoss
from herdling.train.state import State

PAGE = 4
"""Positions of a page of the cache: rollouts of one prompt share all of it but the last few tokens."""


def train(config: Config) -> None:
    """Play and learn until the steps are done; save OUT/model and OUT/report.html."""
    require("matplotlib", "plots")  # before the work, not after it
    run = Run(config, "rl")
    tasks = open_tasks(config.tasks, config.seed, run.processor and run.processor.size)
    loss = PolicyLoss(config.policy, longest=config.online.max_tokens * config.online.turns)
    reference = copy.deepcopy(run.model).requires_grad_(False) if config.policy.kl > 0 else None
    sampler = run.model
    if config.sampler == "bf16":
        sampler = copy.deepcopy(run.model).to(torch.bfloat16).requires_grad_(False)
    lm = LM(sampler, run.tok, run.processor)
    lm.engine = Engine(sampler, run.tok, page=PAGE)
    # A copy follows the trainer from one batch of rollouts to the next; what is measured is the trainer.
    own = lm if sampler is run.model else LM(run.model, run.tok, run.processor)
    with ExitStack() as stack:
        sources, examples = _examples(config, run), None
        if sources:
            loader = load(run, sources, config.online.length, config.example_rows)
            examples = stack.enter_context(closing(loader))
        online = Online(
            lm,
            tasks,
            config.online,
            config.policy,
            config.filter if config.curriculum == "filtered" else None,
            pool=config.filter.pool,
            accumulation=config.accumulation,
            seed=config.seed,
            trainer=run.model,
            reference=reference,
            examples=examples,
        )
        before = _before(config, own, tasks)
        hooks = [
            Every(1, lambda state: _log(state, online)),
            Every(config.evaluate_every, lambda state: _measure(state, config, own, tasks)),
        ]
        state = run.fit(online, loss, hooks=hooks, weight=loss.weight)
    if config.start_share:
        run.average_with_start(config.start_share)
        _measure(state, config, own, tasks)
    write_report(config.out, [task.name for task, _ in tasks], before)
    played = [f"rollouts of {task.name}" for task, _ in tasks]
    run.save(
        data=[*played, *(source.name for source, _ in sources)],
        note=f"{config.policy.loss}, {config.curriculum} prompts"
        + (f", {config.start_share:g} of the start" if config.start_share else ""),
    )


def _examples(config: Config, run: Run) -> spec.Weighted:
    """What `--examples` names, opened; empty where it names nothing."""
    if not config.examples:
        return []
    opening = spec.Opening(
        run.tok, seed=config.seed, length=config.online.length, processor=run.processor
    )
    return spec.open_sources(config.examples, opening, makers())


def open_tasks(given: str, seed: int, side: int | None) -> list[tuple[Task, float]]:
    """The tasks of `--tasks` with their weights; `side`: pixels of a tile, None without vision."""
    return [(open_task(name, seed, side), weight) for name, weight in spec.parse(given)]


def _log(state: State, online: Online) -> None:
    numbers = online.numbers()
    if numbers:
        state.aside = f"reward {numbers['reward']:.3f}"
        state.metrics.log(state.step, **numbers)
        state.metrics.timing(state.step, **online.speed())


def _accuracies(config: Config, lm: LM, tasks: Sequence[tuple[Task, float]]) -> dict[str, float]:
    found = {}
    for task, _ in tasks:
        score = evaluate(
            lm, task, config.evaluate_items, max_tokens=config.online.max_tokens, split="validation"
        )
        found[f"accuracy/{task.name}"] = score.accuracy
    return found


def _measure(state: State, config: Config, lm: LM, tasks: Sequence[tuple[Task, float]]) -> None:
    state.metrics.log(state.step, **_accuracies(config, lm, tasks))


def _before(config: Config, lm: LM, tasks: Sequence[tuple[Task, float]]) -> dict[str, float]:
    """Held-out accuracies before the first step; kept for a run that resumes."""
    path = config.out / "before.json"
    if not (config.resume and path.exists()):
        write_json(path, _accuracies(config, lm, tasks))
    return read_json(path, ConfigError)


LINES = (
    ("Reward of rollouts", ("reward",), ""),
    ("Difficulty", ("expected_pass_rate", "trained_pass_rate", "useful_groups"), "share"),
    ("Difficulty of what was trained on, as the tasks rate it", ("trained_difficulty",), "0 easiest, 1 hardest"),
    ("Entropy of what was drawn", ("entropy",), "nats a token"),
    ("Tokens of a reply", ("reply_tokens",), "tokens"),
    ("Sampler against trainer", ("log_ratio", "flipped_routes"), "mean |log ratio|, share of routes"),
)  # fmt: skip
"""Plots of the report: heading, figures in metrics.jsonl, what they are in."""


def write_report(folder: Path, tasks: Sequence[str], before: dict[str, float]) -> None:
    """RUN/report.html from the metrics of a run."""
    records = read(folder / METRICS)

    def points(name: str) -> list[tuple[int, float]]:
        return [(r["step"], r[name]) for r in records if isinstance(r.get(name), int | float)]

    held = {name: [(0, before[f"accuracy/{name}"]), *points(f"accuracy/{name}")] for name in tasks}
    rows = [(name, f"{own[0][1]:.1%}", f"{own[-1][1]:.1%}") for name, own in held.items()]
    sections = [
        ("Accuracy on held-out items", report.table(("task", "before", "after"), rows, numbers=2)
         + report.lines(held, "steps", "accuracy", smooth=False)),
        ("What was asked: share of trained prompts by task",
         report.lines({name: points(f"share/{name}") for name in tasks}, "steps", "share")),
        *((head, report.lines({n: points(n) for n in names}, "steps", unit)) for head, names, unit in LINES),
    ]  # fmt: skip
    last = records[-1]["step"] if records else 0
    report.write(folder / "report.html", "Online RL", f"{last} steps.", sections)
