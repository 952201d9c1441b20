"""Functions that are checked by running them: the reference is right, nothing else is."""

import pytest

from herdling.errors import ConfigError
from herdling.tasks import jail
from herdling.tasks.functions import KINDS, Functions, _tests

if jail.missing():
    pytest.skip(f"foreign code cannot be confined here: {jail.missing()}", allow_module_level=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_right_and_its_neighbour_is_not(kind: str) -> None:
    task = Functions(kinds=(kind,))
    item, other = (
        task.item(0, "train"),
        next(
            found
            for i in range(1, 99)
            if (found := task.item(i, "train")).key != task.item(0, "train").key
        ),
    )
    assert task.grade(item, item.answer) == 1.0
    assert task.grade(item, f"Like this:\n```python\n{item.answer}\n```") == 1.0
    assert task.grade(item, other.answer) == 0.0


def test_values_are_those_of_the_words() -> None:
    assert dict(_tests("times 3 4"))["f(7)"] == 25
    assert dict(_tests("distance 5"))["f(-20)"] == 25
    assert dict(_tests("above 8"))["f([5, -2, 9, 14])"] == 23
    assert dict(_tests("letter a"))["f('banana')"] == 3
    assert dict(_tests("first 3"))["f('banana')"] == "BAN"
    assert dict(_tests("backwards z"))["f('xyzzy')"] == "yzzyxz"
    for i in range(200):
        item = Functions().item(i, "test")
        assert len({str(value) for _, value in _tests(item.key)}) > 1, item.key


@pytest.mark.parametrize(
    "reply",
    ["", "f = 3", "def f(x): return x", "def g(x): return 1", "import sys\nsys.exit()", "print(1)", "f = lambda *a: True",
     "class f:\n    def __init__(self, x): pass\n    def __eq__(self, other): return True"],
)  # fmt: skip
def test_replies_that_compute_nothing(reply: str) -> None:
    task = Functions()
    assert task.grade(task.item(1, "test"), reply) == 0.0


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"kinds is \('loops',\); use some of times, minus"):
        Functions(kinds=("loops",))
