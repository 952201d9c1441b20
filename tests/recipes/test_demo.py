"""The demo with a nano model and a few steps: every stage, resuming, and its page.

python -m pytest tests/recipes/test_demo.py
"""

import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import Llama4ForConditionalGeneration

import herdling
from herdling.errors import ConfigError
from herdling.recipes import demo, demo_run, demo_stages
from herdling.recipes.demo_stages import PLAY
from herdling.tasks.registry import PREFERENCE_TASKS


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> demo.Config:
    """Just enough tuning for some answers to be right now and then: RL and DPO need a difference."""
    out = tmp_path_factory.mktemp("runs") / "demo"
    return demo.Config(
        out=out, preset="nano", pretrain_steps=60, tune_steps=60, rl_steps=1, dpo_steps=2, rows=2,
        length=128, items=4, learning_rate=4e-3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(config) -> demo.Config:
    assert demo.main(config) == 0
    return config


def test_the_result_is_a_model_folder_for_everyone(run):
    lm = herdling.load(run.out / "model")
    reference = Llama4ForConditionalGeneration.from_pretrained(run.out / "model").eval()
    ids = torch.tensor([lm.tokenizer.encode("def add(a, b):")])
    with torch.no_grad():
        torch.testing.assert_close(
            lm.logits(ids), reference(input_ids=ids).logits, atol=2e-5, rtol=0
        )
    card = (run.out / "model" / "README.md").read_text()
    assert "pretrain" in card
    assert "read_number" in card


def test_the_page_is_whole_and_fetches_nothing(run):
    page = (run.out / "report.html").read_text("utf-8")
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    for part in ("Accuracy on held-out items", "What each stage gave and took", "after DPO",
                 "drawn at temperature 1", "RL: reward", "chosen_reward", "Bits per byte", "<svg", "data:image/png;base64,",
                 "unigram", "gzip", "layer 3", "last window", *run.tasks):  # fmt: skip
        assert part in page, part


def test_figures_are_in_a_file(run):
    found = json.loads((run.out / "evaluation.json").read_text())
    assert set(found["tasks"]) == set(run.tasks)
    assert set(found["bits_per_byte"]) == set(demo_run.demo_report.DOMAINS)
    for stage in run.stages:
        scores = json.loads((run.out / "scores" / f"{stage}.json").read_text())
        assert set(scores["tasks"]) == set(run.tasks)
        assert all(len(score["grades"]) == 4 for score in scores["tasks"].values())
        played = set() if stage == "pretrain" else set(PLAY.split(","))
        assert set(scores["drawn"]) == played
    diary = json.loads((run.out / "demo.json").read_text())
    assert set(diary["seconds"]) == {"tokenizer", *run.stages, "evaluate"}
    assert diary["peak_bytes"] > 1e8


def test_the_same_command_goes_on_where_it_was(run, tmp_path, monkeypatch):
    """Losing the end of a run and running again gives the same model; done stages are not redone."""
    before = (run.out / "model" / "model.safetensors").read_bytes()
    copy = tmp_path / "demo"
    shutil.copytree(run.out, copy)
    for lost in ("model", "evaluation.json", "report.html", "dpo/model", "scores/dpo.json"):
        path = copy / lost
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    trained = []
    train = demo_run.dpo.train
    monkeypatch.setattr(demo_run.dpo, "train", lambda c: trained.append("dpo") or train(c))
    monkeypatch.setattr(demo_run.stage, "run", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(demo_run.rl, "main", lambda *_: pytest.fail("played again"))
    demo.main(replace(run, out=copy))
    assert trained == ["dpo"]
    assert (copy / "model" / "model.safetensors").read_bytes() == before


def test_other_settings_want_another_folder(run):
    with pytest.raises(ConfigError, match="another dpo_steps"):
        demo.main(replace(run, dpo_steps=3))


def test_other_items_are_asked_anew(run, tmp_path, capsys):
    copy = tmp_path / "demo"
    shutil.copytree(run.out, copy)
    demo.main(replace(run, out=copy))
    assert "is complete" in capsys.readouterr().out
    demo.main(replace(run, out=copy, items=5))
    assert json.loads((copy / "evaluation.json").read_text())["tasks"]["arithmetic"]["items"] == 5


def test_stages_of_no_steps_are_left_out(tmp_path):
    """What they need, their tasks and the words of the tuning data go with them."""
    config = demo.Config(out=tmp_path, rl_steps=0, dpo_steps=0)
    assert config.stages == ("pretrain", "tune")
    assert not set(config.tasks) & set(PREFERENCE_TASKS)
    assert "refusals" not in demo_stages.tuning(config).data
    whole = replace(config, dpo_steps=2)
    assert whole.stages == ("pretrain", "tune", "dpo")
    assert set(PREFERENCE_TASKS) < set(whole.tasks)
    assert demo_stages.preferring(whole).model == str(tmp_path / "tune" / "model")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("items", 0, "items is 0; it must be at least 1"),
        ("tune_steps", 0, "tune_steps is 0; it must be at least 1"),
        ("rl_steps", -1, "rl_steps is -1; it must be at least 0"),
        ("learning_rate", math.nan, "learning_rate is nan"),
    ],
)
def test_what_cannot_be_is_told_before_any_work(field, value, words):
    with pytest.raises(ConfigError, match=words):
        demo.Config(**{field: value})
