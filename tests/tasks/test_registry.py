"""What every built-in task keeps: pure, split by content, graded exactly, an honest chance."""

import json
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from PIL import Image

from herdling.data.split import SPLITS
from herdling.errors import ConfigError
from herdling.tasks.base import Item, Task
from herdling.tasks.registry import TASKS, create

COUNTS = {"train": 1500, "validation": 300, "test": 500}


@pytest.fixture(scope="module", params=TASKS)
def drawn(request: pytest.FixtureRequest) -> tuple[Task, dict[str, list[Item]]]:
    task = create(request.param)
    return task, {split: [task.item(i, split) for i in range(n)] for split, n in COUNTS.items()}


def shown(item: Item) -> str:
    """Everything the model is given, pixels included, as a string."""

    def flat(value: Any) -> str:
        if isinstance(value, Image.Image):
            return f"{value.size} {value.tobytes().hex()}"
        raise TypeError(type(value))

    return json.dumps(item.messages, default=flat, sort_keys=True)


def test_the_name_is_the_registered_one(drawn: tuple[Task, Any]) -> None:
    assert TASKS[drawn[0].name]


def test_no_item_of_one_split_is_in_another(drawn: tuple[Task, dict[str, list[Item]]]) -> None:
    for what in (lambda item: item.key, shown):
        seen = {split: {what(item) for item in drawn[1][split]} for split in SPLITS}
        assert not seen["train"] & seen["test"]
        assert not seen["train"] & seen["validation"]
        assert not seen["validation"] & seen["test"]


def test_items_are_pure_and_another_seed_gives_others(drawn: tuple[Task, Any]) -> None:
    task, items = drawn
    again, other = create(task.name), create(task.name, seed=1)
    for split in SPLITS:
        first = [shown(item) for item in items[split][:20]]
        assert [shown(again.item(i, split)) for i in range(20)] == first
        assert [shown(other.item(i, split)) for i in range(20)] != first


def test_items_are_well_formed(drawn: tuple[Task, dict[str, list[Item]]]) -> None:
    for items in drawn[1].values():
        for item in items:
            assert 0 <= item.difficulty <= 1
            assert item.answer.strip() == item.answer != ""
            assert len(item.answer) <= 200
            assert item.messages[-1]["role"] == "user"
    assert (
        len({item.difficulty for item in drawn[1]["train"]}) > 1 or drawn[0].name == "moving_shape"
    )


OWN_RULES = {"functions", "instructions", "arithmetic_steps", "refusals"}
"""Tasks where case matters or working is free; tests of their own try to fool them."""


def test_grading(drawn: tuple[Task, dict[str, list[Item]]]) -> None:
    task, items = drawn
    if task.name in OWN_RULES:
        pytest.skip("graded by rules of its own")
    everything = " ".join(dict.fromkeys(item.answer for item in items["test"]))
    for item in items["test"][:50]:
        assert task.grade(item, item.answer) == 1.0
        assert task.grade(item, f"  {item.answer.removesuffix('.').upper()}. \n") == 1.0
        a = item.answer
        hostile = ["", ".", "\0", "\ud800", "I cannot", "nan", "inf", "None", f"{a} or not", f"x{a}", f"not {a}",
                   f"answer: {a} or {a}x", f"{a}, {a}", f"{a}\n{a}x", f"```\n{a}\n``` or 1", f"{a[:1]}\u200b{a[1:]}x",
                   everything if " " in everything else everything + " x", a * 10_000, "<|eot|>",
                   f"{a}\n\n{a}", "".join(chr(0xFEE0 + ord(c)) if "!" <= c <= "~" else c for c in a) + " "]  # fmt: skip
        for reply in hostile:
            assert task.grade(item, reply) == 0.0, reply[:80]


def test_no_constant_reply_beats_chance(drawn: tuple[Task, dict[str, list[Item]]]) -> None:
    task, items = drawn
    for split in ("train", "test"):
        best = Counter(item.answer for item in items[split]).most_common(1)[0][1]
        share = best / len(items[split])
        # Three standard deviations of the sample, and a little for answers a small split lacks.
        spread = 3 * (task.chance * (1 - task.chance) / len(items[split])) ** 0.5
        assert share <= task.chance + spread + 0.03


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="task 'chess' is unknown; there are read_number, count"):
        create("chess")


def test_the_registry_imports_no_task() -> None:
    code = (
        "import sys; import herdling.tasks.registry; "
        "sys.exit(any(n.startswith('herdling.data.scenes') for n in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
