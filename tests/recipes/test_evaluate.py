"""The evaluate verb: a line a task, the JSON file, and what it refuses."""

import json
from dataclasses import replace

import pytest

import herdling
from herdling.cli import main
from herdling.errors import ConfigError
from herdling.infer.lm import LM
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.model.llama import build
from herdling.recipes.evaluate import names
from herdling.tasks.registry import IMAGE_TASKS, TASKS


def save(path, vision: bool) -> str:
    tok = Tokenizer.train(["how many shapes are there? " * 4], 320)
    config = preset("nano", vision=vision, vocab_size=len(tok))
    if vision:
        config = replace(config, image_token_index=tok.patch)
    herdling.save(LM(initialize(build(config)), tok), path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("m") / "model", vision=True)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("m") / "text", vision=False)


def test_a_line_a_task_and_the_file(folder, tmp_path, capsys):
    file = tmp_path / "scores.json"
    args = ["--tasks", "read_number,count_shapes", "--items", "5", "--max-tokens", "4"]
    assert main(["evaluate", folder, *args, "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["task", "accuracy"]
    assert [line.split()[0] for line in lines if not line.startswith(" ")][1:] == [
        "read_number",
        "count_shapes",
    ]
    saved = json.loads(file.read_text("utf-8"))
    assert saved["model"] == folder
    assert saved["split"] == "test"
    result = saved["tasks"]["count_shapes"]
    assert result["items"] == 5
    assert result["chance"] == pytest.approx(1 / 6)
    assert len(result["samples"]) == 5
    assert result["samples"][0]["question"].startswith("[image] ")


def test_pictures_need_vision(text_folder, capsys):
    assert main(["evaluate", text_folder, "--tasks", "read_number", "--items", "2"]) == 1
    assert "read_number shows pictures" in capsys.readouterr().err


def test_all_leaves_pictures_to_models_with_vision(text_folder, monkeypatch, capsys):
    from herdling.tasks import registry

    asked = []

    class Stub:
        chance = 0.0

        def __init__(self, name: str) -> None:
            self.name = name
            asked.append(name)

        def item(self, index: int, split: str):
            from herdling.tasks.base import Item, ask

            return Item(ask(f"item {index}"), "x", 0, str(index))

        def grade(self, item, reply: str) -> float:
            return 0.5

    monkeypatch.setattr(registry, "create", lambda name, seed: Stub(name))
    assert main(["evaluate", text_folder, "--items", "2", "--max-tokens", "3"]) == 0
    assert asked == [name for name in TASKS if name not in IMAGE_TASKS]
    assert f"{len(IMAGE_TASKS)} tasks with pictures are left out" in capsys.readouterr().out


def test_code_that_cannot_be_confined_is_told_before_the_first_reply(
    text_folder, tmp_path, monkeypatch, capsys
):
    from herdling.recipes import evaluate
    from herdling.tasks import jail, sandbox

    monkeypatch.setattr(jail, "missing", lambda: "darwin has no seccomp")
    sandbox.check.cache_clear()
    lines = tmp_path / "mine.jsonl"
    lines.write_text('{"question": "x", "answer": "y", "grader": "regex", "split": "test"}\n')
    for name in ("functions", str(lines)):
        assert main(["evaluate", text_folder, "--tasks", f"dates,{name}", "--items", "1"]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert "cannot be confined here: darwin has no seccomp; remedy" in said.err
    monkeypatch.setattr(evaluate, "names", lambda given, known: ["dates", "functions", "units"])
    assert main(["evaluate", text_folder, "--items", "1", "--max-tokens", "2"]) == 0
    out = capsys.readouterr().out
    assert "functions is left out: foreign code cannot be confined here: darwin" in out
    assert [line.split()[0] for line in out.splitlines()[2:] if line[0] != " "] == [
        "dates",
        "units",
    ]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--tasks", "read_numbers"], "task 'read_numbers' is unknown; did you mean read_number?"),
        (["--tasks", " , "], "name some of"),
        (["--items", "0"], "items 0"),
        (["--max-tokens", "0"], "max_tokens 0"),
    ],
)
def test_bad_usage_is_told_before_the_model_is_opened(args, words, capsys):
    assert main(["evaluate", "no/such/folder/at/all", *args]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_names():
    assert names("all", ["a", "b"]) == ["a", "b"]
    assert names("b, a,b,", ["a", "b"]) == ["b", "a"]
    with pytest.raises(ConfigError, match="'c' is unknown"):
        names("a,c", ["a", "b"])


def test_nothing_is_asked_before_all_can_be_and_kept(folder, tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text('{"question": "x", "answer": "y", "grader": "nmber"}\n')
    tasks = f"count_shapes,{tmp_path}/mine.jsonl"
    assert main(["evaluate", folder, "--tasks", tasks, "--items", "1"]) == 1
    assert main(["evaluate", folder, "--tasks", "dates", "--json", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "grader 'nmber' is unknown" in said.err
    assert "a folder; remedy: the name of a file" in said.err
