"""A task from JSON lines: questions with answers, and the name of a grader for each.

    {"question": "What is 6 * 7?", "answer": 42, "grader": "number"}
    {"question": "Capital of Peru?", "answer": "B", "grader": "choice", "choices": ["Quito", "Lima"]}
    {"question": "Write double(x) in Python.", "grader": "python", "tests": [["double(4)", 8]]}
    {"question": "What is this?", "images": ["cat.png"], "answer": ["cat", "a cat"]}

`messages` may stand for `question`. `grader` is `exact` if absent; `herdling.tasks.graders` says what
each takes. Further fields: `system`, `difficulty` (0 to 1), `split` (train, validation or test; else
decided by a hash of the question, 80, 10, 10 %), and `reply`, the text to train on where the answer is
none (regex, python). Every line is checked when the file is opened.
"""

import functools
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from herdling.data.conversations import asked, reply
from herdling.data.records import check_images, content, parse, resolved
from herdling.data.sources import shuffled
from herdling.data.split import SPLITS, check_place, split_of
from herdling.data.text_files import lines
from herdling.errors import ConfigError, DataError, InputError
from herdling.inputs import chat
from herdling.tasks.base import Item
from herdling.tasks.graders import GRADERS


class JsonLines:
    """The items of one file, held in memory; their number is finite, so they come round again."""

    def __init__(self, path: Path | str, seed: int = 0) -> None:
        """Raises DataError naming file and line for a record that cannot be asked or graded."""
        self.path, self.seed = Path(path), seed
        self.name = self.path.name
        self._records: dict[str, list[Mapping[str, Any]]] = {split: [] for split in SPLITS}
        for number, _, line in lines(self.path):
            if line.strip():
                record = parse(line, "strict", self.path, number)
                where = f"{self.path}:{number}"
                try:
                    _check(record, where, self.path.parent)
                except DataError as problem:
                    said = str(problem).removeprefix(f"{where}: ")
                    raise DataError(f"{where}: {said}") from None
                split = record.get("split") or split_of(content({"messages": asked(record)}))
                self._records[split].append(record)
        every = [record for records in self._records.values() for record in records]
        self.chance = _chance(every)
        self.runs_code = any(record.get("grader") in ("python", "regex") for record in every)

    def size(self, split: str) -> int:
        """How many items there are before the same come again."""
        return len(self._records[split])

    def item(self, index: int, split: str) -> Item:
        check_place(split, index)
        records = self._records[split]
        if not records:
            raise ConfigError(
                f"{self.path} has no item of split {split!r}; remedy: more lines, or give some the "
                f'field "split": "{split}"'
            )
        record = records[shuffled(index, len(records), f"{self.name}/{self.seed}/{split}")]
        messages = [resolved(message, self.path.parent) for message in asked(record)]
        return Item(messages, _answer(record), float(record.get("difficulty", 0.5)), _key(record))

    def grade(self, item: Item, reply: str) -> float:
        record = self._by_key[item.key]
        return GRADERS[record.get("grader", "exact")].grade(record, reply)

    @functools.cached_property
    def _by_key(self) -> dict[str, Mapping[str, Any]]:
        return {_key(r): r for records in self._records.values() for r in records}


def _check(record: Any, where: str, folder: Path) -> None:
    if not isinstance(record, dict):
        raise DataError(f"is {type(record).__name__}; each line must be a JSON object")
    messages = asked(record)
    if not all(isinstance(message, dict) for message in messages):
        raise DataError("messages must be a list of objects with role and content")
    try:
        chat.check(messages)
    except InputError as problem:
        raise DataError(str(problem)) from None
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise DataError("messages must end with what the model is to answer")
    check_images({"messages": messages}, where, folder)
    grader = record.get("grader", "exact")
    if not isinstance(grader, str) or grader not in GRADERS:
        raise DataError(f"grader {grader!r} is unknown; there are {', '.join(GRADERS)}")
    if grader != "python" and "answer" not in record:
        raise DataError("has no answer")
    GRADERS[grader].check(record)
    difficulty, split = record.get("difficulty", 0.5), record.get("split", "train")
    number = isinstance(difficulty, int | float) and not isinstance(difficulty, bool)
    if not number or not 0 <= difficulty <= 1:
        raise DataError(f"difficulty is {difficulty!r}; it must be a number from 0 to 1")
    if split not in SPLITS:
        raise DataError(f"split is {split!r}; use one of {', '.join(SPLITS)}")
    if not isinstance(record.get("reply", ""), str):
        raise DataError("reply must be a text")


def _answer(record: Mapping[str, Any]) -> str:
    """What to train on, empty where only a grader knows."""
    try:
        return reply(record)
    except DataError:
        return ""


def _key(record: Mapping[str, Any]) -> str:
    """Tells all records apart: two may ask the same and want other answers, or another grader."""
    return json.dumps(record, sort_keys=True)


def _chance(records: list[Mapping[str, Any]]) -> float:
    """The mean over the choices of 1 / how many there are; else the share of the commonest answer."""
    choices = [1 / len(r["choices"]) for r in records if r.get("choices")]
    others = Counter(
        json.dumps(r["answer"]) for r in records
        if not r.get("choices") and r.get("grader") not in ("regex", "python")
    )  # fmt: skip
    best = max(others.values(), default=0)
    return (sum(choices) + best) / len(records) if records else 0.0
