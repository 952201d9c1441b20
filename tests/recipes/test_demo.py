"""The demo with a nano model and a few steps: every stage, resuming, and its page.

python -m pytest tests/recipes/test_demo.py
"""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import Llama4ForConditionalGeneration

import herdling
from herdling.errors import ConfigError
from herdling.recipes import demo


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> demo.Config:
    out = tmp_path_factory.mktemp("runs") / "demo"
    return demo.Config(
        out=out, preset="nano", pretrain_steps=60, tune_steps=2, rows=1, length=128, items=4
    )


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
    for part in ("Accuracy on held-out items", "Bits per byte", "<svg", "data:image/png;base64,",
                 "unigram", "gzip", "layer 3", "last window", *demo.TASKS):  # fmt: skip
        assert part in page, part


def test_figures_are_in_a_file(run):
    found = json.loads((run.out / "evaluation.json").read_text())
    assert set(found["tasks"]) == set(demo.TASKS)
    assert set(found["bits_per_byte"]) == set(demo.DOMAINS)
    diary = json.loads((run.out / "demo.json").read_text())
    assert set(diary["seconds"]) == {"tokenizer", "pretrain", "tune", "evaluate"}
    assert diary["peak_bytes"] > 1e8


def test_the_same_command_goes_on_where_it_was(run, tmp_path, monkeypatch):
    """Losing the end of a run and running again gives the same model; done stages are not redone."""
    before = (run.out / "model" / "model.safetensors").read_bytes()
    copy = tmp_path / "demo"
    shutil.copytree(run.out, copy)
    for lost in ("model", "evaluation.json", "report.html", "tune/model"):
        path = copy / lost
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    trained = []
    stage_run = demo.stage.run
    monkeypatch.setattr(
        demo.stage, "run", lambda s, name, m: trained.append(name) or stage_run(s, name, m)
    )
    demo.main(replace(run, out=copy))
    assert trained == ["tune"]
    assert (copy / "model" / "model.safetensors").read_bytes() == before


def test_other_settings_want_another_folder(run):
    with pytest.raises(ConfigError, match="another tune_steps"):
        demo.main(replace(run, tune_steps=3))


def test_other_items_are_asked_anew(run, tmp_path, capsys):
    copy = tmp_path / "demo"
    shutil.copytree(run.out, copy)
    demo.main(replace(run, out=copy))
    assert "is complete" in capsys.readouterr().out
    demo.main(replace(run, out=copy, items=5))
    assert json.loads((copy / "evaluation.json").read_text())["tasks"]["arithmetic"]["items"] == 5
