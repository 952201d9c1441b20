"""Tasks as preference pairs: the right answer beside a worse one.

herdling dpo --data preferences             refusals, tone and form
herdling dpo --data preferences:3,count_shapes    and the answers of a task beside wrong ones
"""

from functools import partial
from typing import Any, Protocol, runtime_checkable

from herdling.data.preferences import Pair, PairMaker, PairSource, render_pair
from herdling.data.records import Sides
from herdling.data.spec import Opening
from herdling.errors import DataError
from herdling.inputs.images import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer
from herdling.tasks.base import Item, Task
from herdling.tasks.registry import PREFERENCE_TASKS, TASKS, open_task

_TRIES = 200


@runtime_checkable
class Preferring(Protocol):
    """What a task has besides when it knows how its answers go wrong."""

    def worse(self, item: Item) -> str:
        """A reply that is worse than the item's answer: never full marks."""
        ...


class TaskPairs:
    """Endless pairs of one task: its answer, and what `worse` says or another item's answer."""

    size: int | None = None

    def __init__(
        self,
        task: Task,
        tok: Tokenizer,
        *,
        split: str = "train",
        processor: ImageProcessor | None = None,
    ) -> None:
        self.name = task.name
        self._task, self._tok, self._split, self._processor = task, tok, split, processor

    def pair(self, index: int) -> Pair:
        item = self._task.item(index, self._split)
        rejected = self._worse(item, index)
        prompt = [*item.messages, *item.turns]
        asked = Sides(prompt, _says(item.answer), _says(rejected))
        return render_pair(asked, self._tok, self._processor, item.tools or None, self.name)

    def _worse(self, item: Item, index: int) -> str:
        if isinstance(self._task, Preferring):
            return self._task.worse(item)
        for other in range(index + 1, index + _TRIES):
            answer = self._task.item(other, self._split).answer
            if self._task.grade(item, answer) < 1:
                return answer
        raise DataError(f"{self.name}: {_TRIES} items have the same answer, so none is a wrong one")


def _says(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def makers() -> dict[str, PairMaker]:
    """What `--data` of `herdling dpo` may name besides files."""
    return {"preferences": _builtin, **{name: partial(_one, name) for name in TASKS}}


def _one(name: str, opening: Opening) -> list[tuple[PairSource, float]]:
    side = None if opening.processor is None else opening.processor.size
    task = open_task(name, opening.seed, side)
    return [(TaskPairs(task, opening.tok, split=opening.split, processor=opening.processor), 1.0)]


def _builtin(opening: Opening) -> list[tuple[PairSource, float]]:
    return [made for name in PREFERENCE_TASKS for made in _one(name, opening)]
