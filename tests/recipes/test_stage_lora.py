"""Training an adapter through the recipes' real `main`.

python -m pytest tests/recipes/test_stage_lora.py
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import herdling
from herdling import lora
from herdling.checkpoint import Card
from herdling.cli import main
from herdling.errors import CheckpointError, ConfigError
from herdling.metrics import METRICS, read
from herdling.recipes import pretrain, sft
from herdling.train.state import CheckpointConfig

LORA = "r=4,alpha=8,targets=attention+experts+vision+head"


@pytest.fixture(scope="module")
def base(pretrained) -> Path:
    return pretrained()


def tuned(base: Path, out: Path, **fields) -> sft.Config:
    values = dict(data="read_number:1,arithmetic:1", steps=6, rows=2, length=128, lora=LORA)
    return sft.Config(model=str(base), out=out, **{**values, **fields})


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "run"
    assert sft.main(tuned(base, out, checkpoint=CheckpointConfig(every=2, keep=3))) == 0
    return out


def test_only_the_adapter_learns_and_model_holds_the_sum(base, run, capsys):
    before, after = (load_file(f / "model.safetensors") for f in (base, run / "model"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapters = load_file(run / "adapter" / "adapter_model.safetensors")
    assert changed  # experts' and others', and nothing that the targets leave out:
    assert not any(part in name for name in changed for part in ("shared", "router", "norm", "embed_tokens", "projector"))  # fmt: skip
    for part in ("self_attn.q_proj", "experts.down_proj", "vision_model", "lm_head"):
        assert any(part in name for name in changed), part
        assert any(part.removesuffix(".down_proj") in name for name in adapters), part
    lm = herdling.load(base)
    lora.load(lm.model, run / "adapter", "tuned")
    ids = [lm.tokenizer.encode("What is 2 + 3?")]
    with lora.of(lm.model).using(["tuned"]):
        adapted = lm.logits(ids)
    torch.testing.assert_close(adapted, herdling.load(run / "model").logits(ids), atol=2e-5, rtol=0)
    losses = [r["loss"] for r in read(run / METRICS) if "loss" in r]
    assert losses[-1] < losses[0]


def test_commands_take_the_adapter_beside_its_model(base, run, tmp_path, capsys):
    asked = ["--tasks", "arithmetic", "--items", "6", "--max-tokens", "6", "--json"]
    said, told = [], []
    for path, adapter in (
        (base, []),
        (base, ["--adapter", str(run / "adapter")]),
        (run / "model", []),
    ):
        assert main(["evaluate", str(path), *adapter, *asked, str(tmp_path / "scores.json")]) == 0
        found = json.loads((tmp_path / "scores.json").read_text())["tasks"]["arithmetic"]
        said.append([sample["reply"] for sample in found["samples"]])
        capsys.readouterr()
        assert main(["chat", str(path), *adapter, "-p", "2 + 3?", "--temperature", "0", "--max-tokens", "8"]) == 0  # fmt: skip
        told.append(capsys.readouterr().out)
    assert said[0] != said[1] == said[2]
    assert told[0] != told[1] == told[2]
    assert main(["chat", str(base), "--adapter", str(tmp_path / "none"), "-p", "2"]) == 1
    assert f"{tmp_path / 'none'}" in capsys.readouterr().err


def test_the_folder_says_where_it_belongs(base, run):
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)  # fmt: skip
    about = (run / "adapter" / "README.md").read_text()
    assert "library_name: peft" in about
    assert "experts" in about
    assert "base_model" not in about  # it is a folder, no name that the hub would know
    *_, step = Card.open(run / "model", herdling.load(base).config).steps
    assert step.note.endswith(f"LoRA {LORA} merged")


def test_a_stopped_run_resumes_to_the_same_bytes(base, run, tmp_path):
    out = tmp_path / "cut"
    shutil.copytree(run, out)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "adapter")
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    config = tuned(base, out, checkpoint=CheckpointConfig(every=2, keep=3), resume=True)
    sft.main(config)
    for name in (METRICS, "model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (run / name).read_bytes(), name
    with pytest.raises(ConfigError, match=r"lora is 'r=5' but .* was trained with 'r=4,"):
        sft.main(replace(config, lora="r=5"))


def test_settings_are_told_before_any_work(base, tmp_path):
    with pytest.raises(ConfigError, match="lora: 'rank' is no setting"):
        tuned(base, tmp_path / "a", lora="rank=4")
    with pytest.raises(ConfigError, match="--lora needs a trained model, and --model nano starts"):
        pretrain.Config(model="nano", out=tmp_path / "a", steps=1, lora="r=4")
    with pytest.raises(ConfigError, match=r"lora target 'dense' matches nothing; .*the model has"):
        sft.main(tuned(base, tmp_path / "a", lora="targets=dense"))
    (tmp_path / "b" / "adapter" / "mine").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no adapter folder"):
        sft.main(tuned(base, tmp_path / "b"))


@pytest.fixture
def fresh_accelerator():
    """accelerate keeps its first precision for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerator")
def test_it_works_in_bf16_and_in_a_pretraining_that_goes_on(base, tmp_path):
    config = pretrain.Config(
        model=str(base), data="english", out=tmp_path, steps=2, rows=2, length=64,
        precision="bf16", lora="r=4,targets=all",
    )  # fmt: skip
    assert pretrain.main(config) == 0
    herdling.load(tmp_path / "model")
