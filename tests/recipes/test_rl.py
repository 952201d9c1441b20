"""The RL recipe through its real `main`: it learns, resumes to the same bytes, and reports.

python -m pytest tests/recipes/test_rl.py
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import herdling
from herdling.checkpoint import Card
from herdling.errors import ConfigError
from herdling.eval.harness import evaluate
from herdling.infer.lm import LM
from herdling.inputs.tokenizer import Tokenizer
from herdling.metrics import METRICS, TIMING, read
from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.model.llama import build
from herdling.optim.adamw import AdamWConfig
from herdling.optim.schedule import Schedule
from herdling.recipes import rl, rl_run
from herdling.rollouts.config import FilterConfig
from herdling.tasks.base import Item, ask
from herdling.train.config import OnlineConfig, PolicyConfig
from herdling.train.state import CheckpointConfig


class Letters:
    """How many small letters there are, eight being enough: within reach of a model from nothing."""

    name, chance = "letters", 0.0

    def item(self, index: int, split: str) -> Item:
        return Item(ask("say " + "e" * (index % 5)), "eeee", (index % 3) / 2, f"{split}{index}")

    def grade(self, item: Item, reply: str) -> float:
        return min(8, sum("a" <= letter <= "z" for letter in reply)) / 8


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    tok = Tokenizer.train(["say eeee what is 12 + 30? " * 4], 300)
    config = preset("nano", vision=False, vocab_size=len(tok))
    herdling.save(LM(initialize(build(config), std=0.1), tok), folder)
    return folder


@pytest.fixture(autouse=True)
def letters(monkeypatch) -> None:
    monkeypatch.setattr(rl_run, "open_tasks", lambda *_: [(Letters(), 1.0)])


def config(base: Path, out: Path, **fields) -> rl.Config:
    online = OnlineConfig(prompts=3, samples=4, max_tokens=8, length=64)
    return rl.Config(**{
        "model": str(base), "tasks": "letters", "out": out, "steps": 6, "online": online,
        "policy": PolicyConfig(mask_truncated=False), "filter": FilterConfig(pool=16),
        "checkpoint": CheckpointConfig(every=2), "evaluate_every": 3, "evaluate_items": 8, **fields,
    })  # fmt: skip


def same_results(one: Path, other: Path) -> None:
    for name in (METRICS, "model/model.safetensors", "before.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_a_model_learns_what_is_rewarded(base, tmp_path):
    made = config(base, tmp_path, steps=20, optimizer=AdamWConfig(learning_rate=2e-3),
                  schedule=Schedule(kind="constant", warmup=0),
                  online=OnlineConfig(prompts=4, samples=6, max_tokens=8, length=64))  # fmt: skip
    assert rl.main(made) == 0
    records = read(tmp_path / METRICS)
    rewards = [r["reward"] for r in records if "reward" in r]
    assert len(rewards) == 20
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    assert sum(r["log_ratio"] for r in records if "log_ratio" in r) / 20 < 1e-5
    assert all(r["flipped_routes"] < 0.01 for r in records if "flipped_routes" in r)
    before = json.loads((tmp_path / "before.json").read_text())["accuracy/letters"]
    *_, last = [r for r in records if "accuracy/letters" in r]
    assert last["step"] == 20
    assert last["accuracy/letters"] > before + 0.1
    speeds = [r for r in read(tmp_path / TIMING) if "rollouts_per_second" in r]
    assert len(speeds) == 20
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 8
    lm = herdling.load(tmp_path / "model")
    step = Card.open(tmp_path / "model", lm.config).steps[-1]
    assert (step.stage, list(step.data)) == ("rl", ["rollouts of letters"])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"curriculum": "uniform", "lora": "r=4", "sampler": "bf16"},
        {
            "online": OnlineConfig(prompts=4, samples=4, updates=4, max_tokens=8, length=64),
            "accumulation": 2,
            "policy": PolicyConfig(loss="gspo", kl=0.05, mask_truncated=False),
            "checkpoint": CheckpointConfig(every=3),  # in the middle of a batch of rollouts
        },
        {"examples": "english,arithmetic", "example_rows": 2, "start_share": 0.4},
    ],
    ids=["plain", "lora, bf16 sampler", "several updates, kl", "examples beside"],
)
def test_a_killed_run_resumes_to_the_same_bytes(base, tmp_path, monkeypatch, fields):
    whole = config(base, tmp_path / "a", **fields)
    rl.main(whole)
    killed = config(base, tmp_path / "b", **fields)
    log = rl_run._log

    def dies(state, online):
        log(state, online)
        if state.step == 5:
            raise RuntimeError("killed")

    monkeypatch.setattr(rl_run, "_log", dies)
    with pytest.raises(RuntimeError, match="killed"):
        rl.main(killed)
    monkeypatch.setattr(rl_run, "_log", log)
    rl.main(replace(killed, resume=True))
    same_results(tmp_path / "a", tmp_path / "b")
    if "lora" in fields:
        assert (tmp_path / "b" / "adapter" / "adapter_config.json").exists()
    losses = [r["example_loss"] for r in read(tmp_path / "b" / METRICS) if "example_loss" in r]
    assert len(losses) == (6 if "examples" in fields else 0)
    step = Card.open(
        tmp_path / "b" / "model", herdling.load(tmp_path / "b" / "model").config
    ).steps[-1]
    assert ("arithmetic" in step.data) == ("examples" in fields)


def test_a_share_of_the_start_stays_and_is_what_is_measured(base, tmp_path):
    for name, share in (("plain", 0.0), ("averaged", 0.25)):
        rl.main(config(base, tmp_path / name, optimizer=AdamWConfig(learning_rate=2e-3), start_share=share))  # fmt: skip
    start, plain, averaged = (
        dict(herdling.load(folder).model.named_parameters())
        for folder in (base, tmp_path / "plain" / "model", tmp_path / "averaged" / "model")
    )
    moved = 0.0
    for name, own in averaged.items():
        torch.testing.assert_close(own, 0.25 * start[name] + 0.75 * plain[name], atol=1e-6, rtol=1e-5)  # fmt: skip
        moved += (plain[name] - own).abs().sum().item()
    assert moved > 1
    *_, last = [r for r in read(tmp_path / "averaged" / METRICS) if "accuracy/letters" in r]
    score = evaluate(herdling.load(tmp_path / "averaged" / "model"), Letters(), 8, max_tokens=8, split="validation")  # fmt: skip
    assert last["accuracy/letters"] == score.accuracy


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"start_share": 1.0}, r"start_share is 1.0; it must be in \[0, 1\)"),
        ({"start_share": math.nan}, "start_share is nan"),
        ({"start_share": 0.5, "lora": "r=4"}, "averages plain weights; remedy: leave it out"),
        ({"examples": "english", "example_rows": 0}, "example_rows is 0"),
    ],
)
def test_settings_that_cannot_be(base, tmp_path, fields, words):
    with pytest.raises(ConfigError, match=words):
        config(base, tmp_path, **fields)


def test_a_seed_reproduces_and_another_does_not(base, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        rl.main(config(base, tmp_path / name, steps=2, seed=seed))
    same_results(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / METRICS).read_bytes() != (tmp_path / "c" / METRICS).read_bytes()
    shutil.rmtree(tmp_path / "a")


def test_tasks_are_opened_by_name_and_weight(monkeypatch):
    monkeypatch.undo()
    found = rl_run.open_tasks("arithmetic:2,count_shapes", 3, 32)
    assert [(task.name, weight) for task, weight in found] == [
        ("arithmetic", 2.0),
        ("count_shapes", 1.0),
    ]
    with pytest.raises(ConfigError, match="no vision"):
        rl_run.open_tasks("count_shapes", 0, None)
    with pytest.raises(ConfigError, match="task 'nonsense' is unknown"):
        rl_run.open_tasks("nonsense", 0, None)
