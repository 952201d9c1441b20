"""Graders by name, for tasks in JSON lines and for tasks in Python: what is right about a reply.

    GRADERS["number"].grade({"answer": 42}, "6 * 7 = 42\n42")       # 1.0
    GRADERS["python"].check({"tests": [["double(4)", 8]]})          # raises DataError if malformed

All are exact: 1.0 or 0.0, never an exception, whatever the reply holds. A reply that names several
candidates is wrong, and one of more than 4,096 characters (code: 100,000) is wrong unread.
"""

import ast
import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from herdling.errors import DataError
from herdling.tasks import jail, sandbox
from herdling.tasks.base import LONGEST_REPLY, exact, normalise

Record = Mapping[str, Any]

_LONGEST_CODE = 100_000
_NUMBER = re.compile(
    r"[-+\u2212]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:e[-+]?\d{1,3})?",
    re.ASCII | re.IGNORECASE,
)
_ANSWER_IS = re.compile(r"^(?:so )?(?:the |my |final )*(?:answer|result|total)(?: is)? ")
_WORDY = re.compile(r"\w")
_LABEL = re.compile(
    r"(?:(?:the )?(?:correct |right )?(?:answer|choice|option)(?: is)?:? ?)?"
    r"\**\(?([a-z])\)?[.:)]?\**(?: (.+))?",
    re.ASCII,
)
_FENCE = "```"
_LANGUAGE = re.compile(r"[\w+-]*")
_MARKS = " \t\r*$#"
_NUMBER_BEFORE = re.compile(r"(?:^|\W)[-\u2212]|\d[.,]")
_NUMBER_AFTER = re.compile(r"[.,]\d")


@dataclass(frozen=True)
class Grader:
    """A way to grade, and what its records must hold."""

    grade: Callable[[Record, str], float]
    """0.0 or 1.0; never raises (but SandboxError, where code cannot be confined)."""
    check: Callable[[Record], None]
    """Raises DataError for a record that cannot be graded."""


def exactly(record: Record, reply: str) -> float:
    """The reply is the answer, or one of the answers, after `normalise`."""
    return max(exact(answer, reply) for answer in _answers(record))


def number(record: Record, reply: str) -> float:
    """The last line is the answer, a number (within `tolerance`); lines before it are free.

    It stands alone, after `=` or `:`, or after `the answer is`, in bold or not; `1,234.5`, `+7`, `1e3`
    and a minus as U+2212 are numbers, digits of other scripts, nan, inf and fractions are not.
    """
    found = last_number(reply)
    if found is None:
        return 0.0
    off = abs(found - _decimal(str(record["answer"])))
    return float(off <= _decimal(str(record.get("tolerance", 0))))


def last_number(reply: str) -> Decimal | None:
    """The number that the last line which is not blank consists of or ends with; None for none."""
    if len(reply) > LONGEST_REPLY:
        return None
    line = next((line for line in reversed(reply.split("\n")) if line.strip()), "")
    text = normalise(line.strip(_MARKS))
    mark = "=" if "=" in text else ":"
    last = (text.rpartition(mark)[2] if mark in text else _ANSWER_IS.sub("", text)).strip(_MARKS)
    return _decimal(last) if _NUMBER.fullmatch(last) else None


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("\u2212", "-"))


def choice(record: Record, reply: str) -> float:
    """The letter of the right choice: `B`, `(b)`, `**B.**`, `The answer is B`; with `choices` also its text,
    alone or after the letter."""
    if len(reply) > LONGEST_REPLY:
        return 0.0
    said, choices = normalise(reply), [normalise(text) for text in record.get("choices", ())]
    right = normalise(record["answer"])
    if choices.count(said) == 1:
        return float(_letter(choices.index(said)) == right)
    matched = _LABEL.fullmatch(said)
    if matched is None or matched[1] != right:
        return 0.0
    place = ord(right) - ord("a")
    text = choices[place] if place < len(choices) else None
    return float(matched[2] is None or matched[2] == text)


def contains(record: Record, reply: str) -> float:
    """The answer stands in the reply as words of their own, and none of `others` does.

    A model can list many candidates here: name the likely ones in `others`, or use another grader.
    """
    if len(reply) > LONGEST_REPLY:
        return 0.0
    said = normalise(reply)
    right = any(_holds(said, normalise(answer)) for answer in _answers(record))
    return float(right and not any(_holds(said, normalise(o)) for o in record.get("others", ())))


def regex(record: Record, reply: str) -> float:
    """The stripped reply matches the answer, a pattern, from end to end.

    Matched in the sandbox: a reply can make many a pattern take for ever.
    """
    if len(reply) > LONGEST_REPLY:
        return 0.0
    call = f"re.fullmatch({record['answer']!r}, {reply.strip()!r}) is not None"
    return float(sandbox.run("import re", [call]).values == [True])


def as_json(record: Record, reply: str) -> float:
    """The reply is the answer as JSON, alone or in one code fence; order of keys and spaces are free."""
    found = read_json(reply)
    return float(found is not None and _same(found[0], record["answer"]))


def python(record: Record, reply: str) -> float:
    """The code of the reply, alone or in its one code fence, passes all `tests` in the sandbox.

    A test is a pair of an expression and its value, or the text `assert EXPRESSION == VALUE`.
    `setup` is code that runs first, such as imports.
    """
    if len(reply) > _LONGEST_CODE:
        return 0.0
    tests = [_test(test) for test in record["tests"]]
    calls, setup = [call for call, _ in tests], record.get("setup", "")
    outcome = sandbox.run(code_of(reply), calls, setup=setup)
    if outcome.error:
        return 0.0
    return float(
        all(_same(got, want) for got, (_, want) in zip(outcome.values, tests, strict=True))
    )


def code_of(reply: str) -> str:
    """The inside of the only code fence, or the reply itself if it has none; nothing for several."""
    parts = reply.split(_FENCE)
    if len(parts) == 1:
        return reply
    found = _fenced(parts[1]) if len(parts) == 3 else None
    return found[1] if found else ""


def read_json(reply: str) -> tuple[Any] | None:
    """The JSON value of a reply, in a tuple of one; None if it is no strict JSON or too long."""
    if len(reply) > LONGEST_REPLY:
        return None
    text = reply.strip()
    if text.startswith(_FENCE) and text.endswith(_FENCE):
        language, text = _fenced(text[len(_FENCE) : -len(_FENCE)]) or ("", "")
        text = text if language.casefold() in ("", "json") else ""
    try:
        return (json.loads(text, parse_constant=_refuse, object_pairs_hook=_object),)
    except (ValueError, RecursionError):
        return None


def _fenced(inside: str) -> tuple[str, str] | None:
    """(language, text) of what stands between two fences; None where the first ends no line.

    By hand: a pattern takes for ever where a model writes many spaces.
    """
    first, newline, text = inside.partition("\n")
    language = first.strip(" \t")
    if not newline or not _LANGUAGE.fullmatch(language):
        return None
    return language, text.rstrip(" \t").removesuffix("\n")


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice, which says two things")
    return found


def _same(a: Any, b: Any) -> bool:
    """Equal as JSON: 1 is 1.0 but not true; floats may differ by a rounding, not by a whole number."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        if isinstance(a, int) and isinstance(b, int):
            return a == b
        whole = isinstance(a, int) or isinstance(b, int)
        try:
            close = math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
            return close and not (whole and abs(a - b) >= 0.5)
        except OverflowError:
            return False
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def _test(test: Any) -> tuple[str, Any]:
    """(expression, value as the sandbox gives it) of a test in either form; raises DataError.

    Of other asserts, as of a comparison in a pair, the code would know the value, True, and could
    feign it.
    """
    parsed = None
    try:
        match test:
            case [str(expression), value]:
                tree = ast.parse(expression.strip(), mode="eval").body
                parsed = tree, expression.strip(), jail.plain(value)
            case str():
                match ast.parse(test.strip()).body:
                    case [ast.Assert(ast.Compare(left, [ast.Eq() | ast.Is()], [right]))]:
                        parsed = left, ast.unparse(left), jail.plain(ast.literal_eval(right))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    if parsed is None:
        raise DataError(
            f"test {str(test)[:80]!r} is neither [EXPRESSION, VALUE] nor 'assert EXPRESSION == VALUE'"
        )
    tree, expression, value = parsed
    if isinstance(tree, ast.Compare) and isinstance(value, bool):
        raise DataError(
            f"test {str(test)[:80]!r}: code can return what compares as it likes; remedy: the value "
            f"itself, such as ['{ast.unparse(tree.left)[:40]}', VALUE]"
        )
    return expression, value


def _answers(record: Record) -> list[str]:
    answer = record["answer"]
    return answer if isinstance(answer, list) else [answer]


def _holds(said: str, words: str) -> bool:
    """Whether `words` stand in `said` with no letter or digit against either end.

    A number is not within a longer one: 5 does not stand in -5 or 5.3.
    """
    at = said.find(words)
    while at >= 0:
        end = at + len(words)
        before, after = said[max(0, at - 2) : at], said[end : end + 2]
        goes_on = (words[0].isdigit() and _NUMBER_BEFORE.fullmatch(before)) or (
            words[-1].isdigit() and _NUMBER_AFTER.fullmatch(after)
        )
        if (
            not goes_on
            and not _touches(before[-1:], words[0])
            and not _touches(words[-1], after[:1])
        ):
            return True
        at = said.find(words, at + 1)
    return False


def _touches(a: str, b: str) -> bool:
    """Whether two neighbouring characters belong to one word; a combining mark belongs to any."""
    if b and unicodedata.combining(b):
        return True
    return bool(a and b and _WORDY.match(a) and _WORDY.match(b))


def _letter(place: int) -> str:
    return chr(ord("a") + place)


def _check_texts(record: Record) -> None:
    for answer in _answers(record) or [""]:
        if not isinstance(answer, str) or not normalise(answer):
            raise DataError(f"answer is {answer!r}; it must be a text, or a list of texts")
    others = record.get("others", [])
    if not isinstance(others, list) or not all(isinstance(o, str) and normalise(o) for o in others):
        raise DataError(f"others is {str(others)[:80]}; it must be a list of texts")


def _check_number(record: Record) -> None:
    for name in ("answer", "tolerance"):
        value = record.get(name, 0)
        text = str(value)
        usable = isinstance(value, int | float | str) and not isinstance(value, bool)
        if not usable or not _NUMBER.fullmatch(text):
            raise DataError(f"{name} is {text[:80]!r}; it must be a number")
    if _decimal(str(record.get("tolerance", 0))) < 0:
        raise DataError(f"tolerance is {str(record['tolerance'])!r}; it must not be negative")


def _check_choice(record: Record) -> None:
    choices, answer = record.get("choices", []), record["answer"]
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise DataError(f"choices is {str(choices)[:80]}; it must be a list of texts")
    if not isinstance(answer, str) or not re.fullmatch("[A-Za-z]", answer):
        raise DataError(
            f"answer is {str(answer)[:80]!r}; it must be the letter of a choice, such as B"
        )
    if choices and ord(answer.casefold()) - ord("a") >= len(choices):
        raise DataError(f"answer is {answer!r}, but there are {len(choices)} choices")


def _check_regex(record: Record) -> None:
    try:
        re.compile(record["answer"])
    except (re.error, TypeError, RecursionError, OverflowError) as problem:
        raise DataError(f"answer is no regular expression: {problem}") from None


def _check_json(record: Record) -> None:
    if "answer" not in record:
        raise DataError("has no answer")
    try:
        json.dumps(jail.plain(record["answer"]), allow_nan=False)
    except ValueError as problem:
        raise DataError(f"answer is no JSON: {problem}") from None


def _check_python(record: Record) -> None:
    tests = record.get("tests")
    if not isinstance(tests, list) or not tests:
        raise DataError("the grader python needs 'tests', a list such as [[\"double(4)\", 8]]")
    for test in tests:
        _test(test)
    setup = record.get("setup", "")
    if not isinstance(setup, str):
        raise DataError("setup must be Python code as a text")
    try:
        ast.parse(setup)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as problem:
        raise DataError(f"setup is not Python: {problem}") from None


GRADERS: dict[str, Grader] = {
    "exact": Grader(exactly, _check_texts),
    "number": Grader(number, _check_number),
    "choice": Grader(choice, _check_choice),
    "contains": Grader(contains, _check_texts),
    "regex": Grader(regex, _check_regex),
    "json": Grader(as_json, _check_json),
    "python": Grader(python, _check_python),
}
