"""What a verifiable task is: items with one known answer, and an exact grader.

One task feeds three uses: its train items are SFT data, its grade is an RL reward, and its test
items are an evaluation score. A task is a small class with `name`, `chance`, `item` and `grade`;
its items are drawn with `herdling.data.split.draw`, so no test item is ever a train item:

    class Doubling:
        name = "doubling"
        chance = 0.01  # one of a hundred answers, all equally likely

        def __init__(self, seed: int = 0) -> None:
            self.seed = seed

        def item(self, index: int, split: str) -> Item:
            number = draw(self.name, self.seed, split, index, lambda r: r.randrange(100), str)
            return Item(ask(f"What is twice {number}?"), str(2 * number), number / 99, str(number))

        def grade(self, item: Item, reply: str) -> float:
            return exact(item.answer, reply)

A task whose model may call tools also has `respond`, and its items `tools` and `turns`: see
`herdling.tasks.tools` and the calculator. One that grades in the sandbox says so with
`runs_code = True`, so that `evaluate` can ask for a sandbox before it asks the model.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from PIL import Image

LONGEST_REPLY = 4096
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", re.ASCII)


@dataclass(frozen=True)
class Item:
    """One question with its answer."""

    messages: list[dict[str, Any]]
    """The conversation up to the model's turn, in OpenAI form; images are content parts."""
    answer: str
    """The short text that gets full marks, fit to be trained on as the reply."""
    difficulty: float
    """0 (easiest of the task) to 1 (hardest)."""
    key: str
    """The content whose hash decided the split: items of two splits never share one."""
    tools: tuple[dict[str, Any], ...] = ()
    """OpenAI function schemas of what the model may call."""
    turns: tuple[dict[str, Any], ...] = ()
    """One good way from `messages` to the answer: assistant turns with tool_calls, and results."""

    def conversation(self) -> list[dict[str, Any]]:
        """The whole of it as training data: the question, the turns between, the answer."""
        return [*self.messages, *self.turns, {"role": "assistant", "content": self.answer}]


class Task(Protocol):
    """What the mixture, the rollouts and the evaluation ask of a task."""

    name: str
    chance: float
    """Expected grade of the best guess made blind; each task says what its guesser may know."""

    def item(self, index: int, split: str) -> Item:
        """The item at `index` >= 0 of a split; a pure function of (seed, split, index)."""
        ...

    def grade(self, item: Item, reply: str) -> float:
        """0 to 1; never raises, whatever the reply holds."""
        ...


@runtime_checkable
class MultiTurn(Protocol):
    """What a task has besides when its model may call tools before it answers.

    The last reply, the first without a call, is graded.
    """

    def respond(self, item: Item, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The tool messages that follow a conversation which ends with tool_calls.

        A pure function that never raises: what is wrong with a call is said in its result.
        """
        ...


@runtime_checkable
class Finite(Protocol):
    """What a task has besides when its items are a fixed collection."""

    def size(self, split: str) -> int:
        """How many items a split has before the same come again."""
        ...


def ask(question: str, *images: Image.Image) -> list[dict[str, Any]]:
    """One user turn: the images first, then the question."""
    if not images:
        return [{"role": "user", "content": question}]
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def normalise(text: str) -> str:
    """Fold case and whitespace, compose accents (NFC), drop one trailing period and the commas of
    1,234,567."""
    text = unicodedata.normalize("NFC", " ".join(text.casefold().split()))
    text = text.removesuffix(".").rstrip()
    return _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)


def exact(answer: str, reply: str) -> float:
    """1.0 when `reply` is `answer` after `normalise`, else 0.0.

    The whole reply must be the answer: a list of all candidates or an essay that ends well scores
    nothing. Replies beyond 4,096 characters score nothing unread.
    """
    if len(reply) > LONGEST_REPLY:
        return 0.0
    return float(normalise(reply) == normalise(answer))
