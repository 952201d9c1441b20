"""Write a small Python function; it is run on hidden inputs in the sandbox. Answer: the code.

    user       Write a Python function f(x) that returns x times 3 plus 4.
    assistant  def f(x):
                   return x * 3 + 4

Chance: no piece of code is right for two questions, so one of the questions.
"""

import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from herdling.data.drawing import one_of
from herdling.data.split import draw
from herdling.errors import ConfigError
from herdling.tasks.base import Item, ask
from herdling.tasks.graders import python

_NUMBERS = (0, 1, 2, -3, 7, 10, 12, 19, -20, 33)
_LISTS = ([], [1], [3, 3, 3], [5, -2, 9, 14], [20, 1, 7, 7, 12], list(range(-4, 65)))
_TEXTS = ("", "a", "banana", "Oslo is cold", "xyzzy", "the quick brown fox " * 4)


@dataclass(frozen=True)
class _Kind:
    said: str
    """What `f(x)` returns, with {a} for a number or a letter."""
    code: str
    inputs: tuple[Any, ...]
    letters: bool = False


KINDS = {
    "times": _Kind("x times {a} plus {b}", "x * {a} + {b}", _NUMBERS),
    "minus": _Kind("x squared minus {a}", "x * x - {a}", _NUMBERS),
    "distance": _Kind("how far x is from {a}", "abs(x - {a})", _NUMBERS),
    "remainder": _Kind("the remainder of x divided by {a}", "x % {a}", _NUMBERS),
    "larger": _Kind("the larger of x and {a}", "max(x, {a})", _NUMBERS),
    "above": _Kind("the sum of the numbers in x above {a}", "sum(n for n in x if n > {a})", _LISTS),
    "each": _Kind("the list of each number in x times {a}", "[n * {a} for n in x]", _LISTS),
    "equal": _Kind("how many numbers in x are {a}", "x.count({a})", _LISTS),
    "below": _Kind("the list of the numbers in x below {a}", "[n for n in x if n < {a}]", _LISTS),
    "letter": _Kind("how often {a!r} is in x", "x.count({a!r})", _TEXTS, letters=True),
    "without": _Kind("x without the letter {a!r}", "x.replace({a!r}, '')", _TEXTS, letters=True),
    "first": _Kind("the first {a} letters of x in capitals", "x[:{a}].upper()", _TEXTS),
    "backwards": _Kind("x backwards, then {a!r}", "x[::-1] + {a!r}", _TEXTS, letters=True),
}  # fmt: skip
_PARAMETERS = tuple(str(n) for n in range(2, 61))
_WORDINGS = (
    "Write a Python function f(x) that returns {}.",
    "Define f(x) in Python: it returns {}.",
)


class Functions:
    name = "functions"
    runs_code = True

    def __init__(self, seed: int = 0, kinds: tuple[str, ...] = tuple(KINDS)) -> None:
        if not kinds or set(kinds) - KINDS.keys():
            raise ConfigError(f"kinds is {kinds}; use some of {', '.join(KINDS)}")
        self.seed, self.kinds = seed, kinds
        self.chance = 1 / len(kinds) / len(_PARAMETERS)

    def item(self, index: int, split: str) -> Item:
        def make(rng: random.Random) -> tuple[str, str]:
            kind = rng.choice(self.kinds)
            letters = KINDS[kind].letters
            a = rng.choice(string.ascii_letters) if letters else rng.choice(_PARAMETERS)
            key = f"{kind} {a} {rng.randint(1, 20)}" if kind == "times" else f"{kind} {a}"
            return key, one_of(rng, *_WORDINGS)

        key, wording = draw(self.name, self.seed, split, index, make, lambda made: made[0])
        kind, values = _read(key)
        answer = f"def f(x):\n    return {kind.code.format(**values)}"
        return Item(
            ask(wording.format(kind.said.format(**values))), answer, len(kind.code) / 40, key
        )

    def grade(self, item: Item, reply: str) -> float:
        """Runs the code; raises SandboxError where it cannot be confined."""
        return python({"tests": list(_tests(item.key))}, reply)


def _read(key: str) -> tuple[_Kind, dict[str, Any]]:
    name, a, *b = key.split()
    kind = KINDS[name]
    return kind, {"a": a if kind.letters else int(a), "b": int(b[0]) if b else None}


def _tests(key: str) -> Iterator[tuple[str, Any]]:
    """Calls with the values of the reference, which is ours and therefore run right here."""
    kind, values = _read(key)
    reference = eval(f"lambda x: {kind.code.format(**values)}")
    a = values["a"]
    if kind.inputs is _NUMBERS:
        near: tuple[Any, ...] = (a, a + 1)
    else:
        near = (f"{a}x{a}{a}",) if kind.inputs is _TEXTS else ([a, a + 1, a],)
    for given in (*kind.inputs, *near):  # `near` tells the parameter from its neighbours
        yield f"f({given!r})", reference(given)
