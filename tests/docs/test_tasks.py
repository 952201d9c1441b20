"""python -m pytest tests/docs/test_tasks.py: the table of the page is true, its examples run."""

import re
from pathlib import Path

import pytest

from herdling.data.spec import Opening, open_sources
from herdling.inputs.tokenizer import Tokenizer
from herdling.tasks import jail
from herdling.tasks.jsonl import JsonLines
from herdling.tasks.registry import TASKS, create, open_task

PAGE = (Path(__file__).parents[2] / "docs/tasks.md").read_text("utf-8")
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_chances_are_those_of_the_tasks() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| ([\d.]+) \|$", PAGE, re.MULTILINE))
    assert {name: float(chance) for name, chance in rows.items()} == {
        name: pytest.approx(create(name).chance, abs=0.0006) for name in TASKS
    }


@pytest.mark.parametrize("code", CODE)
def test_the_code_runs(code: str, tmp_path: Path) -> None:
    if "sandbox" in code and jail.missing():
        pytest.skip(jail.missing())
    exec(compile(code, "docs/tasks.md", "exec"), {"__name__": "example"})
    if "class Doubling" in code:
        (tmp_path / "my_task.py").write_text(code)
        assert open_task(f"{tmp_path}/my_task.py:Doubling").name == "doubling"


def test_the_lines_are_a_task_and_data(tmp_path: Path) -> None:
    (lines,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    path = tmp_path / "mine.jsonl"
    path.write_text(lines)
    task = JsonLines(path)
    splits = ("train", "validation", "test")
    assert sum(task.size(split) for split in splits) == len(lines.splitlines()) == 7
    for split in splits:
        for i in range(task.size(split)):
            item = task.item(i, split)
            if jail.missing() and ("Python" in item.key or "YYYY" in item.key):
                continue
            assert task.grade(item, item.answer) == 1.0
            assert task.grade(item, "I do not know") == 0.0
    ((source, _),) = open_sources(str(path), Opening(Tokenizer.train([], 300), split="all"))
    assert source.size == 7
