"""Tasks of users: JSON lines with the name of a grader, and classes of Python files."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from herdling.data.mixture import Mixture
from herdling.data.spec import Opening, open_sources
from herdling.errors import ConfigError, DataError
from herdling.inputs.images import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer
from herdling.tasks.base import Finite
from herdling.tasks.jsonl import JsonLines
from herdling.tasks.mixture import makers
from herdling.tasks.registry import open_task

TOK = Tokenizer.train([], 300)
PROCESSOR = ImageProcessor(size=32, patch_size=4)
CODE = """
from dataclasses import dataclass
from herdling.data.split import draw
from herdling.errors import ConfigError
from herdling.tasks.base import Item, ask, exact

@dataclass
class Note:
    text: str

class Doubling:
    name = "doubling"
    chance = 0.01

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def item(self, index: int, split: str) -> Item:
        number = draw(self.name, self.seed, split, index, lambda r: r.randrange(100), str)
        return Item(ask(f"What is twice {number}?"), str(2 * number), number / 99, str(number))

    def grade(self, item: Item, reply: str) -> float:
        return exact(item.answer, reply)

class Drawn(Doubling):
    name = "drawn"
    def __init__(self, seed: int, side: int) -> None:
        self.seed, self.side = seed, side

class Wants(Doubling):
    def __init__(self, words): pass

class Breaks(Doubling):
    def __init__(self): 1 / 0

class Picky(Doubling):
    def __init__(self): raise ConfigError("size is 0")

class Vague(Doubling):
    grade = 1.0

class Nothing: pass
"""


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_items_and_grades_of_json_lines(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "cat.png")
    path = write(
        tmp_path / "mine.jsonl",
        {"question": "Say a.", "answer": ["a", "A!"], "split": "test"},
        {"question": "6 * 7?", "answer": 42, "grader": "number", "split": "test", "difficulty": 0.9},
        {"question": "Capital?", "answer": "B", "grader": "choice", "choices": ["Quito", "Lima"], "split": "test"},
        {"question": "What?", "images": ["cat.png"], "answer": "cat", "grader": "contains", "split": "test"},
        {"messages": [{"role": "user", "content": "As JSON"}], "system": "s", "answer": [1], "grader": "json", "split": "test"},
        {"question": "A year?", "answer": r"\d{4}", "grader": "regex", "reply": "1999", "split": "test"},
        {"question": "double(x)?", "grader": "python", "tests": [["double(2)", 4]], "split": "test"},
    )  # fmt: skip
    task = open_task(str(path))
    assert isinstance(task, JsonLines)
    assert isinstance(task, Finite)
    assert (task.name, task.size("test"), task.size("train")) == ("mine.jsonl", 7, 0)
    items = {item.answer: item for i in range(7) if (item := task.item(i, "test"))}
    assert set(items) == {"a", "42", "B", "cat", "[1]", "1999", ""}
    assert items["42"].difficulty == 0.9
    assert items["[1]"].messages[0] == {"role": "system", "content": "s"}
    assert items["cat"].messages[0]["content"][0] == {
        "type": "image",
        "image": str(tmp_path / "cat.png"),
    }
    for answer, right, wrong in (("a", "A!", "b"), ("42", "6 * 7 = 42", "43"), ("B", "lima", "quito"),
                                 ("cat", "a cat", "a dog"), ("[1]", "[1.0]", "[1, 2]"), ("1999", "2024", "24"),
                                 ("", "def double(x): return x + x", "def double(x): return 5")):  # fmt: skip
        assert task.grade(items[answer], right) == 1.0
        assert task.grade(items[answer], wrong) == 0.0
    assert task.item(7, "test").key in {
        item.key for item in items.values()
    }  # they come round again
    with pytest.raises(ConfigError, match="has no item of split 'train'; remedy: more lines"):
        task.item(0, "train")
    other = JsonLines(path, seed=1)
    assert [other.item(i, "test").key for i in range(7)] != [
        task.item(i, "test").key for i in range(7)
    ]


def test_the_same_question_twice_keeps_two_graders(tmp_path: Path) -> None:
    asked = {"question": "2 + 2?", "answer": "4", "split": "test"}
    task = JsonLines(write(tmp_path / "a.jsonl", {**asked, "grader": "number"}, asked))
    grades = {task.grade(task.item(i, "test"), "2 + 2 = 4") for i in range(2)}
    assert grades == {0.0, 1.0}
    which = {"question": "Which?", "answer": "A", "grader": "choice", "split": "test"}
    choices = [["trout", "bat"], ["bat", "trout"]]
    task = JsonLines(write(tmp_path / "b.jsonl", *({**which, "choices": c} for c in choices)))
    assert sum(task.grade(task.item(i, "test"), "bat") for i in range(2)) == 1.0


def test_marks_and_line_ends_of_other_systems(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"question": f"{i}?", "answer": str(i), "split": "test"}) for i in range(3)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, "", "{"]).encode())
    with pytest.raises(DataError, match=r"a.jsonl:5: not valid JSON"):
        JsonLines(path)
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, ""]).encode())
    assert JsonLines(path).size("test") == 3
    path.write_bytes(b'{"question": "\xff", "answer": "a"}')
    with pytest.raises(DataError, match=r"a.jsonl:1: byte 0xff is not UTF-8"):
        JsonLines(path)


def test_chance_is_that_of_the_commonest_answer(tmp_path: Path) -> None:
    yes = [{"question": f"{i}?", "answer": "yes" if i < 6 else "no"} for i in range(8)]
    choice = {"question": "c", "answer": "A", "grader": "choice", "choices": ["x", "y", "z", "w"]}
    assert JsonLines(write(tmp_path / "a.jsonl", *yes)).chance == 0.75
    assert JsonLines(write(tmp_path / "b.jsonl", choice)).chance == 0.25


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ([1], "is list; each line must be a JSON object"),
        ({"answer": "x"}, "has to have either 'question' or 'messages'"),
        ({"question": 3, "answer": "x"}, "question is int; it must be a text"),
        ({"question": "q"}, "has no answer"),
        ({"question": "q", "answer": "x", "grader": "vibes"}, "grader 'vibes' is unknown; there are exact, number"),
        ({"question": "q", "answer": "x", "grader": "number"}, "answer is 'x'; it must be a number"),
        ({"question": "q", "grader": "python"}, "the grader python needs 'tests'"),
        ({"question": "q", "answer": "x", "difficulty": 2}, "difficulty is 2; it must be a number from 0 to 1"),
        ({"question": "q", "answer": "x", "split": "dev"}, "split is 'dev'"),
        ({"question": "q", "answer": "x", "reply": 3}, "reply must be a text"),
        ({"question": "q", "answer": "x", "images": ["no.png"]}, "no.png is not a file"),
        ({"question": "q", "answer": "x", "images": "no.png"}, "images is str; it must be a list"),
        ({"messages": [{"role": "user"}], "answer": "x"}, "messages[0] has no content"),
        ({"messages": [{"role": "assistant", "content": "x"}], "answer": "x"}, "messages must end with what"),
        ({"messages": ["x"], "answer": "x"}, "messages must be a list of objects"),
    ],
)  # fmt: skip
def test_refusals_name_file_and_line(record: Any, complaint: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "q", "answer": "a"}, record)
    with pytest.raises(DataError) as problem:
        JsonLines(path)
    assert str(problem.value).startswith(f"{path}:2: ")
    assert complaint in str(problem.value)
    assert str(problem.value).count(str(path)) <= 1 + str(problem.value).count("no.png is")


def test_a_class_of_a_file_is_a_task(tmp_path: Path) -> None:
    path = tmp_path / "my_task.py"
    path.write_text(CODE)
    task = open_task(f"{path}:Doubling", seed=3)
    item = task.item(0, "train")
    assert task.grade(item, item.answer) == 1.0
    assert vars(task) == {"seed": 3}
    assert vars(open_task(f"{path}:Drawn", side=64)) == {"seed": 0, "side": 64}
    for name, complaint in (
        (f"{path}:Drawn", "my_task.py:Drawn: the model has no vision"),
        (f"{path}:Tripling", "my_task.py has no class 'Tripling'"),
        (
            f"{path}:Wants",
            "Wants cannot be made: TypeError: .*missing 1 required .*'words'",
        ),
        (f"{path}:Breaks", "Breaks cannot be made: ZeroDivisionError: division by zero"),
        (f"{path}:Picky", "^size is 0$"),
        (f"{path}:Vague", "Vague is no task, it has no grade$"),
        (str(path), "my_task.py is a file of tasks; name one of its classes: .*my_task.py:CLASS"),
        (f"{path}:", "my_task.py is a file of tasks; name one"),
        (f"{tmp_path}/none.jsonl", "none.jsonl is not a file"),
        (f"{path}:Nothing", "is no task, it has no name and no chance and no item and no grade"),
        (f"{tmp_path}/none.py:Doubling", "none.py is not a file"),
        ("arithmetics", "task 'arithmetics' is unknown; did you mean"),
        ("read_number", "task read_number: the model has no vision"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            open_task(name)
    path.write_text("import sys\nsys.exit(0)")
    with pytest.raises(ConfigError, match=r"my_task.py cannot be imported: SystemExit: 0"):
        open_task(f"{path}:Doubling")
    path.write_text("import nosuchmodule")
    with pytest.raises(
        ConfigError, match="cannot be imported: ModuleNotFoundError: No module named 'nosuch"
    ):
        open_task(f"{path}:Doubling")


def test_users_tasks_are_training_data(tmp_path: Path) -> None:
    (tmp_path / "my_task.py").write_text(CODE)
    lines = write(
        tmp_path / "mine.jsonl",
        *({"question": f"{i}?", "answer": i, "grader": "number"} for i in range(30)),
    )
    spec = f"{tmp_path}/my_task.py:Doubling:2,{lines},arithmetic"
    sources = open_sources(spec, Opening(TOK), makers())
    assert [(source.name, weight) for source, weight in sources] == [
        ("doubling", 2.0), (str(lines), 1.0), ("arithmetic", 1.0)]  # fmt: skip
    Mixture(sources)
    # The file is split the same as data and as a task: what is asked in the test is never trained on.
    trained = set()
    source = sources[1][0]
    for i in range(source.size or 0):
        trained.add(TOK.decode(source.example(i).tokens))
    task = JsonLines(lines)
    assert source.size == task.size("train") < 30
    for i in range(task.size("test")):
        asked = task.item(i, "test").messages[0]["content"]
        assert not any(f"\n\n{asked}<|eot|>" in text for text in trained)


def test_an_item_without_an_answer_cannot_be_trained_on(tmp_path: Path) -> None:
    lines = write(
        tmp_path / "a.jsonl", {"question": "f?", "grader": "python", "tests": [["f(1)", 1]]}
    )
    with pytest.raises(DataError, match=r"a.jsonl:1: the grader python knows no reply to train on"):
        open_sources(str(lines), Opening(TOK))
    from herdling.tasks.mixture import TaskSource

    task = JsonLines(write(tmp_path / "b.jsonl", {"question": "f?", "grader": "python", "tests": [["f(1)", 1]], "split": "train"}))  # fmt: skip
    with pytest.raises(DataError, match="an item has no answer to train on"):
        TaskSource(task, TOK, processor=PROCESSOR).example(0)
