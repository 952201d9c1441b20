"""The work of `herdling demo`: each stage, its examination, the published model, the report.

`herdling.recipes.demo_stages` has the settings.
"""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from herdling.checkpoint import Card, save_model
from herdling.errors import ConfigError, require
from herdling.eval.harness import Score, evaluate
from herdling.files import read_json, write_json
from herdling.infer.lm import LM, load
from herdling.metrics import clock
from herdling.recipes import demo_report, dpo, rl, stage
from herdling.recipes import tokenizer as tokenizer_recipe
from herdling.recipes.demo_stages import (
    OWN,
    PLAY,
    PREFER,
    PRETRAIN,
    Config,
    playing,
    preferring,
    pretraining,
    tuning,
)
from herdling.tasks.mixture import makers
from herdling.tasks.registry import IMAGE_TASKS, create

TOKENS_A_SECOND = {"nano": 16_000, "tiny": 8_000}
"""Measured on two cores (docs/log.md), for the forecast on screen; and what a step of RL takes."""
SECONDS_A_STEP = {"nano": 0.7, "tiny": 1.5}


def run(config: Config) -> None:
    """Every stage that is not done yet, then the report."""
    require("matplotlib", "plots")  # before the work, not after it
    demo = _Demo(config)
    demo.announce()
    demo.tokenizer()
    for name in config.stages:
        demo.train(name)
        demo.examine(name)
    demo.publish()
    demo.report()


class _Demo:
    """The stages, each skipped if its result is there."""

    def __init__(self, config: Config) -> None:
        self.config, self.out = config, config.out
        self.diary = self.out / "demo.json"
        settings = {k: str(v) for k, v in vars(config).items() if k not in ("out", "items")}
        past: dict[str, Any] = {"settings": settings}
        if self.diary.exists():
            past = read_json(self.diary)
        if past["settings"] != settings:
            both = {**past["settings"], **settings}
            name = next(k for k in both if past["settings"].get(k) != settings.get(k))
            raise ConfigError(
                f"{self.out} holds a demo with another {name} ({past['settings'].get(name)}, now "
                f"{settings.get(name)}); remedy: the same settings, another --out, or delete the folder"
            )
        self.past: dict[str, Any] = past
        self.seconds: dict[str, float] = past.setdefault("seconds", {})

    def announce(self) -> None:
        if self._published():
            print(f"{self.out} is complete; only the report is made anew.")
            return
        config = self.config
        steps = config.pretrain_steps + config.tune_steps
        tokens = steps * config.rows * config.length
        played = config.rl_steps * SECONDS_A_STEP[config.preset]
        minutes = 1.5 + (tokens / TOKENS_A_SECOND[config.preset] + played) / 60
        print(
            f"A {config.preset} Llama-4-style model will be made in {self.out}: a tokenizer, "
            f"pretraining on text and pictures, instruction tuning ({steps} steps, {tokens / 1e6:.1f} M "
            f"tokens), {config.rl_steps} steps of RL, {config.dpo_steps} of preference training, after "
            "each stage a test on items it has never seen, and a report.\nThis takes about "
            f"{minutes:.0f} to {1.5 * minutes:.0f} minutes on two idle cores and 2 GB of memory. Ctrl-C stops it; the same "
            "command goes on.",
            flush=True,
        )

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        """Run a stage; its time and peak memory go into the diary, summed over attempts.

        An attempt that was killed outright leaves no figure.
        """
        started = time.perf_counter()
        try:
            return work()
        finally:
            spent = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            self.past["peak_bytes"] = max(self.past.get("peak_bytes", 0), _peak_bytes())
            write_json(self.diary, self.past)

    def tokenizer(self) -> None:
        folder = self.out / "tokenizer"
        if (folder / "chat_template.jinja").exists():  # the last of its files
            return
        recipe = tokenizer_recipe.Config(
            data="builtin",
            out=folder,
            vocab_size=2048,
            specials="compact",
            single_digits=True,
            limit=4_000_000,
        )
        self.timed("tokenizer", lambda: tokenizer_recipe.main(recipe))

    def train(self, name: str) -> None:
        """Run a stage, if its model is not there."""
        if (self.out / name / "model" / "config.json").exists():
            return
        work: dict[str, Callable[[], object]] = {
            "pretrain": lambda: stage.run(pretraining(self.config), "pretrain", makers("document")),
            "tune": lambda: stage.run(tuning(self.config), "tune", makers()),
            "rl": lambda: rl.main(playing(self.config)),
            "dpo": lambda: dpo.train(preferring(self.config)),
        }
        self.timed(name, work[name])

    def examine(self, name: str) -> None:
        """OUT/scores/NAME.json: every task on held-out items; first and last, bits per byte."""
        path = self.out / "scores" / f"{name}.json"
        if path.exists() and read_json(path)["items"] == self.config.items:
            return
        self.timed("evaluate", lambda: self._examine(name, path))

    def _examine(self, name: str, path: Path) -> None:
        lm = load(self.out / name / "model")
        scores = [self.score(lm, task) for task in self.config.tasks]
        # What RL works on is replies as it draws them; pretraining has no replies yet.
        played = self._played if name != self.config.stages[0] else ()
        drawn = [self.score(lm, task, temperature=1.0) for task in played]
        bits = {}
        if name in (
            self.config.stages[0],
            self.config.stages[-1],
        ):  # windows of the length that the model was trained on
            config = self.config
            bits = demo_report.bits_per_byte(
                lm, config.length, config.seed, count=min(60, config.items)
            )
        print(f"{name}: " + ", ".join(f"{s.task} {s.accuracy:.0%}" for s in scores), flush=True)
        write_json(
            path,
            {
                "items": self.config.items,
                "tasks": {score.task: score.plain() for score in scores},
                "drawn": {score.task: score.plain() for score in drawn},
                "bits_per_byte": {domain: vars(result) for domain, result in bits.items()},
            },
        )

    @property
    def _played(self) -> Sequence[str]:
        return PLAY.split(",") if self.config.rl_steps else ()

    def score(self, lm: LM, name: str, items: int | None = None, temperature: float = 0.0) -> Score:
        side = {"side": lm.processor.size} if name in IMAGE_TASKS and lm.processor else {}
        task = create(name, seed=self.config.seed, **side)
        items = items or self.config.items
        return evaluate(lm, task, items, max_tokens=24, keep=6, temperature=temperature)

    def publish(self) -> None:
        """OUT/model: the last stage's model with its scores in the card, OUT/evaluation.json."""
        if self._published():
            return
        name = self.config.stages[-1]
        last = self.out / name / "model"
        lm, found = load(last), read_json(self.out / "scores" / f"{name}.json")
        results = {name: round(score["accuracy"], 4) for name, score in found["tasks"].items()}
        card = replace(Card.open(last, lm.config), name=self.out.name, results=results)
        save_model(lm.model, lm.config, self.out / "model", lm.tokenizer, lm.processor, card=card)
        write_json(self.out / "evaluation.json", found)

    def _published(self) -> bool:
        found = self.out / "evaluation.json"
        if not found.exists() or not (self.out / "model" / "config.json").exists():
            return False
        return read_json(found)["items"] == self.config.items

    def report(self) -> None:
        """OUT/report.html, made anew each time from what the run left."""
        lm = load(self.out / "model")
        samples = [
            sample for name in self.config.tasks for sample in self.score(lm, name, 6).samples[:3]
        ]
        total = sum(self.seconds.values())
        facts = [(name, clock(seconds)) for name, seconds in self.seconds.items()]
        facts += [("peak memory", f"{self.past['peak_bytes'] / 1e9:.2f} GB")]
        facts += [("pretraining data", PRETRAIN), ("tuning data", tuning(self.config).data)]
        if "rl" in self.config.stages:
            facts += [("RL tasks", f"{PLAY}; beside them, the tuning data")]
        if "dpo" in self.config.stages:
            facts += [("preference pairs", f"{PREFER}; its own answers to {OWN}")]
        lead = (
            f"A toy: {sum(p.numel() for p in lm.model.parameters()) / 1e6:.1f} M parameters, trained "
            f"from nothing in {total / 60:.1f} minutes on this machine, seed {self.config.seed}."
        )
        demo_report.write(self.out, self.config.stages, lm, samples, facts, lead, self.config.seed)
        print(
            f"{self.out / 'report.html'}: the story with plots\n{self.out / 'model'}: the model; "
            f"{clock(total)} in all, at most {self.past['peak_bytes'] / 1e9:.1f} GB\n"
            f"talk to it: herdling chat {self.out / 'model'}"
        )


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
