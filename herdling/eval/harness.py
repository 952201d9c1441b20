"""How often a model is right on a task's held-out items, beside the chance level.

    score = evaluate(lm, create("read_number"), items=200)
    score.accuracy, score.low, score.high, score.chance

Replies are greedy and batched. A task with tools is played to its end: calls are answered until a
reply has none. Left out: several tries per item, and partial credit by a judge.
"""

import math
import time
from dataclasses import dataclass, fields
from typing import Any

from herdling.errors import ConfigError
from herdling.infer.lm import LM
from herdling.infer.request import Completion
from herdling.inputs import chat
from herdling.tasks.base import Item, MultiTurn, Task

MOST_TURNS = 4
"""Replies to one item, calls of tools included."""


@dataclass(frozen=True)
class Sample:
    """One item with the model's reply; `item.messages` holds its pictures."""

    item: Item
    reply: str
    grade: float
    """0 to 1."""


@dataclass(frozen=True)
class Score:
    """A task's result."""

    task: str
    items: int
    accuracy: float
    """Mean grade."""
    low: float
    """Wilson's interval for `accuracy`, 95 %."""
    high: float
    chance: float
    """Accuracy of the best guess that ignores picture and numbers."""
    cut_short: int
    """Replies that ran into the token limit."""
    seconds: float
    samples: list[Sample]
    """The first items, for a report."""

    @property
    def above_chance(self) -> bool:
        """Whether the whole interval lies above the chance level."""
        return self.low > self.chance

    def plain(self) -> dict[str, Any]:
        """Numbers and texts for a JSON file, without pictures."""
        result = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "samples"}
        texts = [
            {
                "question": question(s.item),
                "answer": s.item.answer,
                "reply": s.reply,
                "grade": s.grade,
            }
            for s in self.samples
        ]
        return {**result, "samples": texts}


def evaluate(
    lm: LM,
    task: Task,
    items: int = 200,
    *,
    max_tokens: int = 32,
    split: str = "test",
    keep: int = 8,
) -> Score:
    """Grade greedy replies to the first `items` items of `split`.

    Raises ConfigError for no items, InputError where the model cannot take the task (pictures for
    a text-only model).
    """
    if items < 1:
        raise ConfigError(f"items is {items}; it must be at least 1")
    start = time.perf_counter()
    asked = [task.item(i, split) for i in range(items)]
    replies = _play(lm, task, asked, max_tokens)
    samples = [
        Sample(item, reply.text, task.grade(item, reply.text))
        for item, reply in zip(asked, replies, strict=True)
    ]
    accuracy = sum(sample.grade for sample in samples) / items
    low, high = wilson(accuracy, items)
    cut = sum(reply.finish_reason == "length" for reply in replies)
    seconds = time.perf_counter() - start
    return Score(task.name, items, accuracy, low, high, task.chance, cut, seconds, samples[:keep])


def _play(lm: LM, task: Task, asked: list[Item], max_tokens: int) -> list[Completion]:
    """The last reply to each item."""
    talks = [list(item.messages) for item in asked]
    last: dict[int, Completion] = {}
    going = list(range(len(asked)))
    for _ in range(MOST_TURNS):
        prompts = [lm.render(talks[i], tools=asked[i].tools) for i in going]
        last.update(zip(going, lm.generate(prompts, max_tokens=max_tokens), strict=True))
        again = []
        for i in going:
            if asked[i].tools and isinstance(task, MultiTurn):
                said = chat.parse(last[i].text)
                if said["tool_calls"]:
                    talks[i] += [said, *task.respond(asked[i], [*talks[i], said])]
                    again.append(i)
        if not (going := again):
            break
    return [last[i] for i in range(len(asked))]


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for `share` of `count` tries; z of 1.96 covers 95 %.

    For grades between 0 and 1 it is, if anything, too wide.
    """
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = share * (1 - share) / count + z * z / (4 * count * count)
    half = z / (1 + z * z / count) * math.sqrt(spread)
    # Rounding must not push an end past the share itself, nor past 0 and 1.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def question(item: Item) -> str:
    """The text of the last user turn; each picture is `[image]`."""
    content = item.messages[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", "[image]") for part in content)
