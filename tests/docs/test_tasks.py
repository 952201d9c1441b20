"""python -m pytest tests/docs/test_tasks.py: the table of the page is true."""

import re
from pathlib import Path

import pytest

from herdling.tasks.registry import TASKS, create

PAGE = (Path(__file__).parents[2] / "docs/tasks.md").read_text("utf-8")


def test_chances_are_those_of_the_tasks() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| ([\d.]+) \|$", PAGE, re.MULTILINE))
    assert {name: float(chance) for name, chance in rows.items()} == {
        name: pytest.approx(create(name).chance, abs=0.0006) for name in TASKS
    }
