"""The page of `herdling demo`: what each stage gave and took, curves, samples, who works on what."""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from herdling.data.sources import Example
from herdling.data.spec import Opening, open_sources
from herdling.eval import report
from herdling.eval.experts import expert_use
from herdling.eval.harness import Sample, Score, change
from herdling.eval.likelihood import Likelihood, likelihood
from herdling.files import read_json
from herdling.infer.lm import LM
from herdling.metrics import METRICS, read

DOMAINS = ("code", "english", "multilingual", "picture/number", "picture/scene")
TITLES = {"pretrain": "pretraining", "tune": "tuning", "rl": "RL", "dpo": "DPO"}


def bits_per_byte(lm: LM, length: int, seed: int, count: int) -> dict[str, Likelihood]:
    """Likelihood of `count` held-out examples of each domain, in windows of `length` tokens."""
    return likelihood(lm, _examples(lm, count, seed), length=length)


def _examples(lm: LM, count: int, seed: int) -> Iterator[Example]:
    opening = Opening(lm.tokenizer, "test", seed, 256, lm.processor)
    for source, _ in open_sources(",".join(DOMAINS), opening):
        yield from (source.example(i) for i in range(min(count, source.size or count)))


def write(
    out: Path,
    stages: Sequence[str],
    lm: LM,
    samples: Sequence[Sample],
    facts: Sequence[tuple[str, Any]],
    lead: str,
    seed: int,
) -> None:
    """OUT/report.html from what the stages left in OUT."""
    found = {name: read_json(out / "scores" / f"{name}.json") for name in stages}
    scores = {name: _scores(each["tasks"]) for name, each in found.items()}
    drawn = {name: _scores(each["drawn"]) for name, each in found.items() if each["drawn"]}
    use = expert_use(lm, _examples(lm, 12, seed))
    heat = "".join(
        report.heat_map(list(use), [use[d][i].tolist() for d in use], f"layer {layer}")
        for i, layer in enumerate(lm.config.text.moe_layers or ())
    )
    first = found[stages[0]]["bits_per_byte"]
    sections = [
        ("Accuracy on held-out items, at the end", report.accuracies(scores[stages[-1]])),
        ("What each stage gave and took", _stages(scores)),
        ("Loss", report.curves({n: _losses(out / n) for n in ("pretrain", "tune")}, "nats a token")),
        ("Bits per byte on held-out text, after pretraining",
         report.likelihoods({d: Likelihood(**r) for d, r in first.items()})),
        ("the same, and at the end", _bits({n: found[n] for n in (stages[0], stages[-1])})),
        ("Samples", report.samples(samples)),
        ("Experts: who works on what", heat),
        ("How busy experts were while training", _loads(out / stages[0])),
        ("The run", _run(lm, facts)),
    ]  # fmt: skip
    after = []
    if "rl" in stages:
        after = [("What RL plays, replies drawn at temperature 1", _stages(drawn)),
                 ("RL: reward of its own answers", _lines(out / "rl", ("reward",), "mean grade"))]  # fmt: skip
    if "dpo" in stages:
        names = ("chosen_reward", "rejected_reward", "preferred")
        lines = _lines(out / "dpo", names, "reward; share preferred")
        after.append(("DPO: chosen above rejected, beside the start", lines))
    sections[2:2] = after
    report.write(out / "report.html", "Herdling demo", lead, sections)


def _scores(found: dict[str, Any]) -> list[Score]:
    return [Score(**{**score, "samples": []}) for score in found.values()]


def _stages(scores: dict[str, list[Score]]) -> str:
    """A row a task: accuracy after each stage, and how it moved beside the stage before."""
    names = list(scores)
    rows = []
    lost = []
    for i, score in enumerate(scores[names[0]]):
        cells: list[str] = [f"{score.accuracy:.1%}"]
        for before, after in pairwise(names):
            moved = change(scores[before][i], scores[after][i])
            if moved.lost:
                lost.append(f"{score.task} in {TITLES[after]}")
            cells.append(f"{scores[after][i].accuracy:.1%} ({moved.gained:+.1%} \u00b1 {moved.noise:.1%})")  # fmt: skip
        rows.append((score.task, *cells))
    head = ("task", *(f"after {TITLES[name]}" for name in names))
    verdict = (
        "No task lost more than noise in any stage."
        if not lost
        else "Lost more than noise: " + ", ".join(lost) + "."
    )
    return report.table(head, rows, numbers=len(names)) + (
        f"<p>{verdict} In brackets the change by the stage, with the half-width of its 95 % interval "
        "over items (paired: the same items each time). After pretraining nothing has been told how a "
        "conversation goes. Of forty comparisons one or two cross their interval by chance.</p>"
    )


def _bits(found: dict[str, Any]) -> str:
    rows = [
        (domain, *(f"{each['bits_per_byte'][domain]['bits_per_byte']:.3f}" for each in found.values()))
        for domain in next(iter(found.values()))["bits_per_byte"]
    ]  # fmt: skip
    return report.table(("domain", *(TITLES[name] for name in found)), rows, numbers=len(found))


def _losses(folder: Path) -> list[tuple[int, float]]:
    return [(r["tokens"], r["loss"]) for r in read(folder / METRICS) if "loss" in r]


def _lines(folder: Path, names: Sequence[str], unit: str) -> str:
    records = read(folder / METRICS)
    points = {name: [(r["step"], r[name]) for r in records if name in r] for name in names}
    return report.lines(points, "steps", unit)


def _loads(folder: Path) -> str:
    tables = [r["expert_load"] for r in read(folder / METRICS) if "expert_load" in r]
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


def _run(lm: LM, facts: Sequence[tuple[str, Any]]) -> str:
    settings = json.dumps(lm.config.to_hf()["text_config"], indent=1)
    rows = [*facts, ("threads", torch.get_num_threads())]
    return (
        report.table(("what", "value"), rows)
        + f"<details><summary>config.json</summary><pre>{settings}</pre></details>"
    )
