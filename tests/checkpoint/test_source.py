"""Hub names: what is asked of the hub, and what happens when it does not answer.

Run: python -m pytest tests/checkpoint/test_source.py
"""

import fnmatch

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from herdling.checkpoint import Card, open_model, save_model
from herdling.checkpoint.source import on_hub, resolve
from herdling.errors import CheckpointError
from herdling.model.config import preset

REPOSITORY = [
    "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer.model", "chat_template.jinja", "README.md", "LICENSE",
    "pytorch_model.bin", "original/consolidated.00.pth", "original/params.json",
    "training_args.pt", "modeling_custom.py", "optimizer.pkl",
]  # fmt: skip


def test_a_hub_name_opens_like_a_folder(tmp_path, monkeypatch, random_model):
    config = preset("nano", vision=False, vocab_size=320)
    save_model(random_model(config), config, tmp_path / "m", card=Card("toy"))
    asked = {}

    def download(name, **how):
        asked.update(name=name, **how)
        return str(tmp_path / "m")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    _, found = open_model("someone/Toy-1.0")
    assert found == config
    assert asked["name"] == "someone/Toy-1.0"
    taken = [
        name
        for name in REPOSITORY
        if any(fnmatch.fnmatch(name, pattern) for pattern in asked["allow_patterns"])
        and not any(fnmatch.fnmatch(name, pattern) for pattern in asked["ignore_patterns"])
    ]
    assert taken == REPOSITORY[:8]


def test_a_folder_wins_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "model").mkdir(parents=True)
    assert not on_hub("someone/model")
    assert on_hub("someone/other")
    assert resolve("someone/model").resolve() == tmp_path / "someone" / "model"


@pytest.mark.parametrize("problem", [LocalEntryNotFoundError("no\nnet"), OSError("no route")])
def test_a_silent_hub_is_one_line(monkeypatch, problem):
    def download(*_, **__):
        raise problem

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match="no such folder here, and the hub") as caught:
        resolve("someone/model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "/no/such/folder",
        "runs/a/model",
        "../x/y",
        "model",
        "runs/my--model",
        "runs/x.git",
        "runs/x-",
    ],
)
def test_what_cannot_be_a_hub_name_is_not_asked_for(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(CheckpointError, match=r"no such folder .and not a hub name") as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(tmp_path / "model.safetensors")


def test_of_a_run_the_model_is_named(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").touch()
    with pytest.raises(CheckpointError, match=r"is a run; its model is .*/model$"):
        resolve(tmp_path)
    (tmp_path / "adapter").mkdir()
    with pytest.raises(CheckpointError, match=r"its model is .*/model, its adapter .*/adapter$"):
        resolve(tmp_path)


def test_a_save_cut_between_its_two_renames_is_undone(tmp_path):
    (tmp_path / ".model.old").mkdir()
    assert resolve(tmp_path / "model").is_dir()
