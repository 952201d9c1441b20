"""The training recipes through their real `main`: a model from nothing, tuned, opened by transformers.

python -m pytest tests/recipes/test_stage.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, Llama4ForCausalLM, Llama4ForConditionalGeneration

import herdling
from herdling import config as settings
from herdling.checkpoint import Card
from herdling.data import embedded
from herdling.errors import ConfigError
from herdling.infer.lm import LM
from herdling.inputs.image_processor import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer
from herdling.metrics import METRICS, read
from herdling.optim.adamw import AdamWConfig
from herdling.optim.schedule import Schedule
from herdling.recipes import pretrain, sft
from herdling.recipes.start import start
from herdling.train.health import RoutingConfig
from herdling.train.state import CheckpointConfig


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("base")
    config = pretrain.Config(
        model="nano",
        tokenizer=tokenizer,
        data="english:1,picture/number:1,arithmetic:1",
        out=out,
        steps=4,
        rows=2,
        length=128,
    )
    assert pretrain.main(config) == 0
    return out


def same_results(one: Path, other: Path) -> None:
    for name in (METRICS, "model/model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_pretraining_ends_in_a_folder_that_transformers_opens(base):
    lm = herdling.load(base / "model")
    reference = Llama4ForConditionalGeneration.from_pretrained(base / "model").eval()
    ids = torch.tensor([lm.tokenizer.encode("What is 2 + 3?")])
    with torch.no_grad():
        torch.testing.assert_close(
            lm.logits(ids), reference(input_ids=ids).logits, atol=2e-5, rtol=0
        )
    assert AutoTokenizer.from_pretrained(base / "model").encode(
        "2 + 3", add_special_tokens=False
    ) == (lm.tokenizer.encode("2 + 3"))
    assert [step.stage for step in Card.open(base / "model", lm.config).steps] == ["pretrain"]
    assert (base / "config.yaml").read_text().startswith("model: nano")


def test_tuning_learns_answers_only_and_adds_to_the_lineage(base, tmp_path, capsys):
    config = sft.Config(
        model=str(base / "model"), data="read_number:1,arithmetic:1", out=tmp_path, steps=3, rows=2, length=128
    )  # fmt: skip
    assert sft.main(config) == 0
    lm = herdling.load(tmp_path / "model")
    card = Card.open(tmp_path / "model", lm.config)
    assert [step.stage for step in card.steps] == ["pretrain", "sft"]
    assert set(card.steps[-1].data) == {"read_number", "arithmetic"}
    assert (
        lm.chat([{"role": "user", "content": "What is 2 + 2?"}], max_tokens=3)["role"]
        == "assistant"
    )


def test_a_stopped_run_resumes_to_the_same_bytes(tokenizer, tmp_path):
    whole = pretrain.Config(
        model="nano", vision=False, tokenizer=tokenizer, data="english,arithmetic", out=tmp_path / "a",
        steps=6, rows=2, length=96, checkpoint=CheckpointConfig(every=2, keep=3),
    )  # fmt: skip
    pretrain.main(whole)
    # The same run, of which everything after step 4 is lost (as a kill would lose it).
    cut = replace(whole, out=tmp_path / "b")
    pretrain.main(cut)
    shutil.rmtree(tmp_path / "b" / "model")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-00000006")
    pretrain.main(replace(cut, resume=True))
    same_results(tmp_path / "a", tmp_path / "b")
    records = read(tmp_path / "b" / METRICS)
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    reference = Llama4ForCausalLM.from_pretrained(tmp_path / "a" / "model")
    assert reference.config.model_type == "llama4_text"


def test_a_killed_run_with_pictures_resumes_to_the_same_bytes(tokenizer, tmp_path):
    whole = pretrain.Config(
        model="nano", tokenizer=tokenizer, data="english:1,picture/number:1", out=tmp_path / "a",
        steps=6, rows=2, length=96, checkpoint=CheckpointConfig(every=2),
    )  # fmt: skip
    pretrain.main(whole)
    killed = replace(whole, out=tmp_path / "b")
    settings.save(killed, tmp_path / "run.yaml")
    command = [sys.executable, "-m", "herdling", "pretrain", "--config", str(tmp_path / "run.yaml")]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with open(tmp_path / "said", "wb") as said:
        process = subprocess.Popen(command, env=os.environ | threads, stderr=said, stdout=said)
    while process.poll() is None and not (tmp_path / "b/checkpoints/step-00000002").exists():
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL, (tmp_path / "said").read_text()
    pretrain.main(replace(killed, resume=True))
    same_results(tmp_path / "a", tmp_path / "b")
    assert not [path for path in (tmp_path / "b").rglob(".*")]


def test_the_data_is_logged(base):
    *_, about = [r for r in read(base / METRICS) if "fill" in r]
    assert about["step"] == 4
    assert 0.5 < about["fill"] <= 1
    assert about["skipped"] == 0
    shares = {name: share for name, share in about.items() if name.startswith("share/")}
    assert shares.keys() == {"share/english", "share/picture/number", "share/arithmetic"}
    assert sum(shares.values()) == pytest.approx(1)


def test_a_run_is_not_overwritten(base, tokenizer):
    config = pretrain.Config(model="nano", tokenizer=tokenizer, out=base, steps=4)
    with pytest.raises(ConfigError, match="already holds a run; remedy: --resume"):
        pretrain.main(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "english"}, "data is 'english' but .* trained with 'english:1,picture"),
        ({"length": 64}, "length is 64 but .* trained with 128"),
        ({"precision": "bf16"}, "precision is 'bf16' but .* trained with 'fp32'"),
        ({"vision": False}, "vision is False but .* trained with True"),
        ({"model": "tiny"}, "model is 'tiny' but .* trained with 'nano'"),
        ({"optimizer": AdamWConfig(learning_rate=1.0)}, r"optimizer\.learning_rate is 1\.0 but .*"),
        ({"schedule": Schedule(warmup=3)}, r"schedule\.warmup is 3 but .* trained with"),
        ({"routing": RoutingConfig(balance=0.5)}, r"routing\.balance is 0\.5 but .* trained with"),
        ({"steps": 9}, "steps is 9 but .* trained with 4, as its schedule spans them all; remedy"),
    ],
)
def test_resuming_with_other_settings_is_an_error_that_changes_nothing(base, change, message):
    config = settings.load(pretrain.Config, base / "config.yaml")
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=message) as caught:
        pretrain.main(replace(config, resume=True, **change))
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in base.rglob("*") if path.is_file()} == before


def test_a_finished_run_resumes_to_itself(base):
    config = settings.load(pretrain.Config, base / "config.yaml")
    before = (base / METRICS).read_bytes()
    assert pretrain.main(replace(config, resume=True, checkpoint=CheckpointConfig(every=3))) == 0
    assert (base / METRICS).read_bytes() == before


def test_a_run_resumes_where_its_folders_were_moved(base, tokenizer, tmp_path):
    shutil.copytree(base, tmp_path / "run")
    shutil.copytree(tokenizer, tmp_path / "tokenizer")
    config = settings.load(pretrain.Config, base / "config.yaml")
    moved = replace(config, resume=True, out=tmp_path / "run", tokenizer=tmp_path / "tokenizer")
    assert pretrain.main(moved) == 0
    same_results(base, tmp_path / "run")


def test_another_tokenizer_must_fit_the_model_at_the_start(base, tmp_path):
    big, other = tmp_path / "big", tmp_path / "other"
    Tokenizer.train(embedded.texts(limit=200_000), 700, "compact").save(big)
    Tokenizer.train(embedded.texts(limit=200_000), 400, "compact").save(other)
    for tokenizer, message in ((big, "has 700 ids"), (other, "image_token_index is")):
        with pytest.raises(ConfigError, match=message):
            start(str(base / "model"), tokenizer, name="run")


def test_the_card_names_the_hub_only_where_the_model_came_from_it(base, tmp_path, monkeypatch):
    def published(model: str, out: str) -> dict[str, Any]:
        config = pretrain.Config(
            model=model, data="picture/number", out=tmp_path / out, steps=1, rows=1, length=96
        )
        pretrain.main(config)
        return ModelCard.load(tmp_path / out / "model" / "README.md").data.to_dict()

    monkeypatch.chdir(tmp_path)
    shutil.copytree(base / "model", tmp_path / "runs" / "base")
    local = published("runs/base", "local")
    assert "base_model" not in local
    assert "datasets" not in local
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(base / "model"))
    assert published("someone/base", "far")["base_model"] == ["someone/base"]


def test_bad_settings_are_told_before_any_work(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="needs --tokenizer DIR"):
        pretrain.main(pretrain.Config(model="nano", out=tmp_path / "x", steps=1))
    with pytest.raises(
        ConfigError, match="'nan' is neither a folder nor a preset; did you mean nano"
    ):
        pretrain.main(
            pretrain.Config(model="nan", tokenizer=tokenizer, out=tmp_path / "x", steps=1)
        )
    with pytest.raises(ConfigError, match="steps is 0"):
        pretrain.Config(model="nano", out=tmp_path, steps=0)
    with pytest.raises(ConfigError, match="no vision"):
        pretrain.main(
            pretrain.Config(model="nano", vision=False, tokenizer=tokenizer, data="pictures",
                            out=tmp_path / "y", steps=1)
        )  # fmt: skip


def test_jsonl_conversations(base, tmp_path):
    path = tmp_path / "chats.jsonl"
    with path.open("w") as file:
        for number in range(40):  # equal ones would all be in one split
            turns = [
                {"role": "user", "content": f"Hi {number}"},
                {"role": "assistant", "content": "Hello."},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    config = sft.Config(
        model=str(base / "model"), data=str(path), out=tmp_path / "run", steps=2, rows=2, length=64
    )
    assert sft.main(config) == 0
    losses = [r["loss"] for r in read(tmp_path / "run" / METRICS) if "loss" in r]
    assert losses[1] < losses[0]


def test_pictures_are_cut_as_the_model_folder_says(base, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(base / "model", folder)
    (folder / "processor_config.json").unlink()
    pixels = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels | {"max_patches": 3}))
    begun = start(str(folder), name="run")
    assert begun.processor is not None
    assert begun.processor.max_tiles == 3
    assert begun.processor == herdling.load(folder).processor


def test_a_text_model_has_no_processor_whatever_files_lie_there(tokenizer, tmp_path):
    begun = start("nano", tokenizer, name="run", vision=False)
    lm = LM(begun.model, begun.tok)
    herdling.save(lm, tmp_path / "model")
    ImageProcessor().save(tmp_path / "model")
    assert start(str(tmp_path / "model"), name="run").processor is None
