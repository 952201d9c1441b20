"""The whole life of a tiny multimodal model, on this machine and on data it already has.

    herdling demo [--out runs/demo]        then: herdling chat runs/demo/model

Tokenizer, joint text and image pretraining, instruction tuning, evaluation on held-out items, report.
Stopped at any moment, the same command goes on where it was. Left out: everything that would take
longer than a coffee (long context, preference tuning, quantization).
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from herdling.checkpoint import Card, save_model
from herdling.data.sources import Example
from herdling.data.spec import Opening, open_sources
from herdling.errors import ConfigError, require
from herdling.eval import report
from herdling.eval.experts import expert_use
from herdling.eval.harness import Sample, Score, evaluate
from herdling.eval.likelihood import Likelihood, likelihood
from herdling.files import read_json, write_json
from herdling.infer.lm import LM, load
from herdling.metrics import METRICS, clock, read
from herdling.optim.adamw import AdamWConfig
from herdling.optim.schedule import Schedule
from herdling.recipes import stage
from herdling.recipes import tokenizer as tokenizer_recipe
from herdling.tasks.mixture import makers
from herdling.tasks.registry import IMAGE_TASKS, create
from herdling.train.health import RoutingConfig
from herdling.train.state import CheckpointConfig

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
RATES = ("vision_model*=0.33", "multi_modal_projector*=0.33")
"""At the decoder's rate the encoder never begins to read (docs/log.md)."""
TOKENS_A_SECOND = {"nano": 16_000, "tiny": 7_000}
"""Measured on two cores (docs/log.md), for the forecast on screen."""
DOMAINS = ("code", "english", "multilingual", "picture/number", "picture/scene")


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


def main(config: Config) -> int:
    require("matplotlib", "plots")  # before the work, not after it
    demo = _Demo(config)
    demo.announce()
    demo.tokenizer()
    demo.train("pretrain", demo.pretraining())
    demo.train("tune", demo.tuning())
    demo.publish()
    demo.report()
    return 0


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
        steps = self.config.pretrain_steps + self.config.tune_steps
        tokens = steps * self.config.rows * self.config.length
        minutes = 0.5 + tokens / TOKENS_A_SECOND[self.config.preset] / 60
        print(
            f"A {self.config.preset} Llama-4-style model will be made in {self.out}: a tokenizer, "
            f"pretraining on text and pictures, instruction tuning ({steps} steps, {tokens / 1e6:.1f} M "
            f"tokens), a test on items it has never seen, and a report.\nThis takes about {minutes:.0f} "
            "minutes on two idle cores and 2 GB of memory. Ctrl-C stops it; the same command goes on.",
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

    def pretraining(self) -> stage.Stage:
        return stage.Stage(
            model=self.config.preset,
            tokenizer=self.out / "tokenizer",
            data=PRETRAIN,
            out=self.out / "pretrain",
            steps=self.config.pretrain_steps,
            rows=self.config.rows,
            length=self.config.length,
            optimizer=AdamWConfig(
                learning_rate=self.config.learning_rate, weight_decay=0.05, rates=RATES
            ),
            schedule=Schedule(kind="wsd", warmup=100, decay=0.2, final=0.5),
            routing=RoutingConfig(balance=0.01),
            checkpoint=CheckpointConfig(every=200, keep=1),
            seed=self.config.seed,
            resume=True,
        )

    def tuning(self) -> stage.Stage:
        return replace(
            self.pretraining(),
            model=str(self.out / "pretrain" / "model"),
            tokenizer=None,
            data=TUNE,
            out=self.out / "tune",
            steps=self.config.tune_steps,
            optimizer=AdamWConfig(
                learning_rate=self.config.learning_rate / 2, weight_decay=0.05, rates=RATES
            ),
            schedule=Schedule(kind="linear", warmup=50, final=0.0),
            # Other items of the same tasks than pretraining read.
            seed=self.config.seed + 1,
        )

    def train(self, name: str, settings: stage.Stage) -> None:
        if (settings.out / "model" / "config.json").exists():
            return
        form = "document" if name == "pretrain" else "chat"
        self.timed(name, lambda: stage.run(settings, name, makers(form)))

    def publish(self) -> None:
        """OUT/model: the tuned model with its scores in the card."""
        if not self._published():
            self.timed("evaluate", self._evaluate)

    def _published(self) -> bool:
        found = self.out / "evaluation.json"
        if not found.exists() or not (self.out / "model" / "config.json").exists():
            return False
        return read_json(found)["items"] == self.config.items

    def _evaluate(self) -> None:
        lm = load(self.out / "tune" / "model")
        scores = []
        for name in TASKS:
            scores.append(self._score(lm, name))
            print(
                f"  {name:<14} {scores[-1].accuracy:6.1%}   chance {scores[-1].chance:.1%}",
                flush=True,
            )
        results = {score.task: round(score.accuracy, 4) for score in scores}
        card = replace(Card.open(self.out / "tune" / "model", lm.config), name=self.out.name)
        save_model(
            lm.model, lm.config, self.out / "model", lm.tokenizer, lm.processor,
            card=replace(card, results=results),
        )  # fmt: skip
        bits = self._likelihood(load(self.out / "pretrain" / "model"))
        write_json(
            self.out / "evaluation.json",
            {
                "items": self.config.items,
                "tasks": {s.task: s.plain() for s in scores},
                "bits_per_byte": {domain: vars(result) for domain, result in bits.items()},
            },
        )

    def _score(self, lm: LM, name: str, items: int | None = None) -> Score:
        side = {"side": lm.processor.size} if name in IMAGE_TASKS and lm.processor else {}
        task = create(name, seed=self.config.seed, **side)
        return evaluate(lm, task, items or self.config.items, max_tokens=24, keep=6)

    def _examples(self, lm: LM, count: int) -> Iterator[Example]:
        opening = Opening(lm.tokenizer, "test", self.config.seed, 256, lm.processor)
        for source, _ in open_sources(",".join(DOMAINS), opening):
            yield from (source.example(i) for i in range(min(count, source.size or count)))

    def _likelihood(self, lm: LM) -> dict[str, Likelihood]:
        # Windows of the length that the model was trained on.
        return likelihood(lm, self._examples(lm, 60), length=self.config.length)

    def report(self) -> None:
        """OUT/report.html, made anew each time from what the run left."""
        found = read_json(self.out / "evaluation.json")
        lm = load(self.out / "model")
        scores = [Score(**{**found["tasks"][name], "samples": []}) for name in TASKS]
        use = expert_use(lm, self._examples(lm, 12))
        heat = "".join(
            report.heat_map(list(use), [use[d][i].tolist() for d in use], f"layer {layer}")
            for i, layer in enumerate(lm.config.text.moe_layers or ())
        )
        sections = [
            ("Accuracy on held-out items", report.accuracies(scores)),
            ("Loss", report.curves({n: _losses(self.out / n) for n in ("pretrain", "tune")}, "nats a token")),
            (
                "Bits per byte on held-out text, after pretraining",
                report.likelihoods({d: Likelihood(**r) for d, r in found["bits_per_byte"].items()}),
            ),
            ("Samples", report.samples(self._samples(lm))),
            ("Experts: who works on what", heat),
            ("How busy experts were while training", self._loads()),
            ("The run", self._run(lm)),
        ]  # fmt: skip
        total = sum(self.seconds.values())
        lead = (
            f"A toy: {_parameters(lm) / 1e6:.1f} M parameters, trained from nothing in "
            f"{total / 60:.1f} minutes on this machine, seed {self.config.seed}."
        )
        report.write(self.out / "report.html", "Herdling demo", lead, sections)
        print(
            f"{self.out / 'report.html'}: the story with plots\n{self.out / 'model'}: the model; "
            f"{clock(total)} in all, at most {self.past['peak_bytes'] / 1e9:.1f} GB\n"
            f"talk to it: herdling chat {self.out / 'model'}"
        )

    def _samples(self, lm: LM) -> Iterator[Sample]:
        for name in TASKS:
            yield from self._score(lm, name, 6).samples[:3]

    def _loads(self) -> str:
        tables = [
            r["expert_load"] for r in read(self.out / "pretrain" / METRICS) if "expert_load" in r
        ]
        if not tables:
            return "<p>The run was shorter than one window of loads.</p>"
        rows = [f"layer {i}" for i in range(len(tables[0]))]
        return "".join(
            report.heat_map(rows, loads, title)
            for title, loads in (
                ("first window of pretraining", tables[0]),
                ("last window", tables[-1]),
            )
        )

    def _run(self, lm: LM) -> str:
        rows = [(name, clock(seconds)) for name, seconds in self.seconds.items()]
        rows += [
            ("peak memory", f"{self.past['peak_bytes'] / 1e9:.2f} GB"),
            ("threads", torch.get_num_threads()),
            ("pretraining data", PRETRAIN),
            ("tuning data", TUNE),
        ]
        settings = json.dumps(lm.config.to_hf()["text_config"], indent=1)
        return (
            report.table(("what", "value"), rows)
            + f"<details><summary>config.json</summary><pre>{settings}</pre></details>"
        )


def _losses(folder: Path) -> list[tuple[int, float]]:
    return [(r["tokens"], r["loss"]) for r in read(folder / METRICS) if "loss" in r]


def _parameters(lm: LM) -> int:
    return sum(p.numel() for p in lm.model.parameters())


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
