"""Preference pairs from a model's own replies: of several to one prompt, a right and a wrong one.

    write_pairs(lm, [(create("count_shapes"), 1.0)], Path("pairs.jsonl"), count=256)

The file holds ordinary pairs (herdling.data.records), pictures in it as data URIs, so that it can be
looked at and used again. What the model says itself, right beside wrong, moves it least from where it
stands: nothing is learnt but the difference.
"""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from herdling.errors import ConfigError, DataError
from herdling.files import atomic_file
from herdling.infer.lm import LM
from herdling.metrics import Progress
from herdling.rollouts.play import Game, play
from herdling.rollouts.rollout import Rollout
from herdling.tasks.base import Item, Task

_PROMPTS_AT_ONCE = 32
_PROMPTS_A_PAIR = 20
"""How many prompts are tried for a pair before a task counts as too easy or too hard."""


def write_pairs(
    lm: LM,
    tasks: Sequence[tuple[Task, float]],
    path: Path,
    *,
    count: int,
    tries: int = 8,
    temperature: float = 1.0,
    max_tokens: int = 64,
    split: str = "train",
    first: int = 0,
) -> dict[str, int]:
    """Write `count` pairs, shared out by weight; return how many each task gave.

    Each prompt, from item `first` on, is tried `tries` times; where grades differ, the shortest of the
    best is chosen and the first of the worst rejected. A task that is always right or always wrong
    gives fewer; raises DataError where none gives any.
    """
    if count < 1 or tries < 2:
        raise ConfigError(f"count is {count} and tries {tries}; at least 1 and 2 are needed")
    total = sum(weight for _, weight in tasks)
    weighed, shared = 0.0, 0
    given: dict[str, int] = {}
    with (
        Progress("rollouts", count) as progress,
        atomic_file(path) as temporary,
        temporary.open("w", encoding="utf-8") as file,
    ):
        for task, weight in tasks:
            # What rounding takes from one task the next ones get: few pairs of many tasks are so many.
            weighed += weight
            wanted = round(count * weighed / total) - shared
            shared += wanted
            found, start = 0, first
            while found < wanted and start - first < _PROMPTS_A_PAIR * wanted:
                items = [task.item(i, split) for i in range(start, start + _PROMPTS_AT_ONCE)]
                start += _PROMPTS_AT_ONCE
                games = [
                    Game(task, item, n)
                    for n, item in enumerate(i for i in items for _ in range(tries))
                ]
                played = play(lm, games, max_tokens=max_tokens, temperature=temperature)
                for i, item in enumerate(items):
                    record = _pair(item, played[i * tries : (i + 1) * tries])
                    if record is not None and found < wanted:
                        file.write(json.dumps(record, ensure_ascii=False) + "\n")
                        found += 1
                progress.update(sum(given.values()) + found, task.name)
            given[task.name] = found
        if not any(given.values()):
            raise DataError(
                f"rollouts: no prompt of {', '.join(given)} got both right and wrong replies; remedy: "
                "tasks of medium difficulty, or more tries"
            )
    return given


def _pair(item: Item, played: Sequence[Rollout]) -> dict[str, Any] | None:
    """The record of one prompt; None where no reply is better than another. Silence is never chosen."""
    done = [one for one in played if not one.truncated and one.reply]
    best = max((one.grade for one in done), default=0.0)
    worst = min(one.grade for one in played)
    if best <= worst:
        return None
    chosen = min((one for one in done if one.grade == best), key=lambda one: one.length)
    rejected = next(one for one in played if one.grade == worst)
    asked = len(item.messages)
    record = {
        "prompt": [_plain(message) for message in item.messages],
        "chosen": chosen.messages[asked:],
        "rejected": rejected.messages[asked:],
    }
    return record | ({"tools": list(item.tools)} if item.tools else {})


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its pictures as data URIs."""
    content = message["content"]
    if isinstance(content, str):
        return message
    parts = [{**p, "image": _uri(p["image"])} if p["type"] == "image" else p for p in content]
    return {**message, "content": parts}


def _uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")  # lossless: the model sees the very same pixels
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
