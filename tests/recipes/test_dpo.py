"""Preference training through its real `main`: reference, resume, adapters.

python -m pytest tests/recipes/test_dpo.py
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import herdling
from herdling.checkpoint import Card
from herdling.errors import ConfigError, DataError
from herdling.metrics import METRICS, read
from herdling.optim.adamw import AdamWConfig
from herdling.recipes import dpo, dpo_run
from herdling.train.preference import PreferenceConfig
from herdling.train.state import CheckpointConfig


@pytest.fixture(scope="module")
def base(pretrained) -> Path:
    return pretrained()


def config(base: Path, out: Path, **fields) -> dpo.Config:
    given = dict(
        data="form:2,count_shapes", pairs=12, batch=4, length=192, steps=6,
        optimizer=AdamWConfig(learning_rate=1e-3), checkpoint=CheckpointConfig(every=2, keep=3),
    )  # fmt: skip
    return dpo.Config(model=str(base), out=out, **{**given, **fields})


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dpo") / "run"
    assert dpo.main(config(base, out)) == 0
    return out


def lines(folder: Path) -> list[dict]:
    return [r for r in read(folder / METRICS) if "loss" in r]


def test_chosen_answers_move_ahead_of_the_reference(run):
    found = lines(run)
    # At first the model is its own reference: log 2 and a share of the chosen answers' loss.
    assert found[0]["loss"] == pytest.approx(0.6931 + 0.2 * found[0]["chosen_nll"], abs=1e-3)
    assert found[0]["chosen_reward"] == pytest.approx(0, abs=1e-4)
    assert found[-1]["chosen_reward"] > found[-1]["rejected_reward"]
    assert found[-1]["preferred"] > 0.5
    card = Card.open(run / "model", herdling.load(run / "model").config)
    assert [step.stage for step in card.steps] == ["pretrain", "dpo"]
    assert set(card.steps[-1].data) == {"form", "count_shapes"}
    assert "12 pairs" in str(card.steps[-1])


def test_the_reference_is_kept_and_belongs_to_its_pairs_and_weights(base, run, tmp_path):
    table = load_file(run / "reference.safetensors")["log_probs"]
    assert table.shape == (12, 2)
    assert (table < 0).all()
    copy = tmp_path / "run"
    copy.mkdir()
    shutil.copy(run / "reference.safetensors", copy / "reference.safetensors")
    before = (copy / "reference.safetensors").stat().st_mtime_ns
    dpo.main(config(base, copy, steps=1))
    assert (copy / "reference.safetensors").stat().st_mtime_ns == before  # read, not made
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(run / "reference.safetensors", other / "reference.safetensors")
    dpo.main(config(base, other, steps=1, pairs=8))
    assert load_file(other / "reference.safetensors")["log_probs"].shape == (8, 2)


def test_the_reference_of_other_settings_is_not_taken(base, run, tmp_path, monkeypatch):
    """A run that was killed before its first step may be started again with others."""
    made: list[str] = []
    answers = dpo_run.answers
    monkeypatch.setattr(dpo_run, "answers", lambda *given: made.append("batch") or answers(*given))
    for i, (fields, count) in enumerate(
        (({}, 0), ({"without": "none"}, 3), ({"qat": "w4a8"}, 3), ({"precision": "fp16"}, 3))
    ):
        out = tmp_path / str(i)
        out.mkdir()
        shutil.copy(run / "reference.safetensors", out / "reference.safetensors")
        made.clear()
        dpo.main(config(base, out, steps=1, **fields))
        assert len(made) == count, fields
        assert lines(out)[0]["rejected_reward"] == pytest.approx(0, abs=2e-3), fields


def test_the_models_own_answers_are_those_of_this_run(base, tmp_path, monkeypatch):
    played: list[Path] = []

    def write(lm, tasks, path, **_):
        played.append(path)
        pair = {"prompt": "Say", "chosen": "yes", "rejected": "no"}
        path.write_text("".join(json.dumps({**pair, "prompt": str(i)}) + "\n" for i in range(6)))
        return {"form": 6}

    monkeypatch.setattr(dpo_run, "write_pairs", write)
    out = tmp_path / "run"
    out.mkdir()
    (out / "rollouts.jsonl").write_text(
        '{"prompt": "of", "chosen": "another", "rejected": "run"}\n'
    )
    fields = {"data": "form", "rollouts": "form", "steps": 2}
    dpo.main(config(base, out, **fields))
    shutil.rmtree(out / "model")
    dpo.main(config(base, out, resume=True, **fields))
    assert played == [out / "rollouts.jsonl"]


@pytest.mark.parametrize("lost", ["", "reference.safetensors"])
def test_a_killed_run_resumes_to_the_same_bytes(base, run, tmp_path, lost):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model")
    shutil.rmtree(copy / "checkpoints" / "step-00000006")
    if lost:
        (copy / lost).unlink()
    dpo.main(config(base, copy, resume=True))
    for name in (METRICS, "model/model.safetensors", "reference.safetensors"):
        assert (copy / name).read_bytes() == (run / name).read_bytes(), name


def test_another_loss_is_another_run(base, run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    with pytest.raises(ConfigError, match=r"preference\.loss is 'ipo'"):
        dpo.main(config(base, copy, resume=True, preference=PreferenceConfig(loss="ipo")))


def test_an_adapter_learns_alone_and_starts_as_the_reference(base, tmp_path):
    fields = {"lora": "r=4,alpha=8,targets=attention+experts", "steps": 3}
    dpo.main(config(base, tmp_path / "run", **fields))
    found = lines(tmp_path / "run")
    assert found[0]["chosen_reward"] == pytest.approx(0, abs=1e-4)
    assert found[-1]["preferred"] > 0
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".self_attn." in name or ".experts." in name for name in changed)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_losses_without_a_reference_read_no_answer_before(base, tmp_path, loss):
    preference = PreferenceConfig(loss=loss, beta=2.0)
    dpo.main(config(base, tmp_path / "run", steps=2, preference=preference))
    assert not (tmp_path / "run" / "reference.safetensors").exists()
    assert lines(tmp_path / "run")[1]["loss"] > 0


def test_pairs_of_a_file(base, tmp_path):
    path = tmp_path / "pairs.jsonl"
    with path.open("w") as file:
        for i in range(30):
            pair = {"prompt": f"Say {i}", "chosen": str(i), "rejected": "no"}
            file.write(json.dumps(pair) + "\n")
    made = config(base, tmp_path / "run", data=str(path), steps=2)
    dpo.main(made)
    assert "preference" in (tmp_path / "run" / "config.yaml").read_text()
    path.write_text(path.read_text().replace("Say", "Tell"))
    with pytest.raises(DataError, match="read differently"):
        dpo.main(replace(made, resume=True))
