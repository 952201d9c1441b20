"""How often a model is right on a task's held-out items, beside the chance level.

    score = evaluate(lm, create("read_number"), items=200)
    score.accuracy, score.low, score.high, score.chance

Replies are greedy, or drawn several times an item, which makes `accuracy` its pass@1. A task with
tools is played to its end: calls are answered until a reply has none. Left out: partial credit by a
judge.
"""

import math
import time
from dataclasses import dataclass, fields
from typing import Any

from herdling.errors import ConfigError
from herdling.infer.lm import LM
from herdling.rollouts.play import Game, play
from herdling.tasks.base import Finite, Item, Task


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
    """Conversations that ran into the limit of tokens or turns."""
    seconds: float
    samples: list[Sample]
    """The first items, for a report."""
    grades: list[float]
    """The grade of every item, in order."""

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
    tries: int = 1,
    temperature: float = 0.0,
    adapter: str | None = None,
) -> Score:
    """Grade replies to the first `items` items of `split`, greedy unless there is a temperature.

    With several `tries` an item counts with the mean of its grades. `adapter` names a loaded one. Raises ConfigError for no items,
    InputError where the model cannot take the task (pictures for a text-only model).
    """
    for name, value in (("items", items), ("tries", tries)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if isinstance(task, Finite):
        items = max(1, min(items, task.size(split)))  # none is an error of the task's own
    start = time.perf_counter()
    asked = [task.item(i, split) for i in range(items)]
    # A seed of its own for each: with one for all, every item would be drawn at the same quantile.
    games = [Game(task, item, i) for i, item in enumerate(asked * tries)]
    played = play(lm, games, max_tokens=max_tokens, temperature=temperature, adapter=adapter)
    samples = [Sample(one.item, one.reply, one.grade) for one in played[:keep]]
    accuracy = sum(one.grade for one in played) / len(played)
    low, high = wilson(accuracy, items)
    cut = sum(one.truncated for one in played)
    grades = [sum(one.grade for one in played[i::items]) / tries for i in range(items)]
    seconds = time.perf_counter() - start
    return Score(task.name, items, accuracy, low, high, task.chance, cut, seconds, samples, grades)


@dataclass(frozen=True)
class Change:
    """How a task's accuracy moved from one model to another, on the same items."""

    gained: float
    noise: float
    """Half of the 95 % interval of `gained`, from the differences item by item."""

    @property
    def lost(self) -> bool:
        """Whether it fell by more than noise."""
        return self.gained < -self.noise


def change(before: Score, after: Score) -> Change:
    """Compare two scores of the same items. Raises ConfigError where they are of others.

    Paired: what both get right or wrong says nothing, so the interval is far narrower than those of
    the two accuracies.
    """
    if before.task != after.task or len(before.grades) != len(after.grades):
        raise ConfigError(
            f"{before.task} with {len(before.grades)} items and {after.task} with "
            f"{len(after.grades)} cannot be compared; remedy: the same task and items"
        )
    moved = [b - a for a, b in zip(before.grades, after.grades, strict=True)]
    n, mean = len(moved), sum(moved) / len(moved)
    variance = sum((x - mean) ** 2 for x in moved) / max(1, n - 1)
    # With no item moved there is no variance to see; one in 3/n could still move (rule of three).
    return Change(mean, max(1.959964 * math.sqrt(variance / n), 3 / n))


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
