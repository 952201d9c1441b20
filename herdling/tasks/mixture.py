"""Tasks as training data: items with their answers as conversations, or as plain documents.

herdling sft --data tasks                    all tasks, those with pictures if the model sees
herdling sft --data arithmetic:2,languages   single tasks with weights
herdling sft --data my_task.py:MyTask:2      a task of one's own (see herdling.tasks.registry)

open_sources("tasks", opening, makers())
"""

from functools import partial
from typing import Any, Literal

from PIL import Image

from herdling.data.record_source import illustrated, joined
from herdling.data.sources import Example
from herdling.data.spec import Maker, Opening, Weighted
from herdling.errors import ConfigError, DataError
from herdling.inputs import chat, tool_calls
from herdling.inputs.images import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer
from herdling.tasks.base import Item, Task
from herdling.tasks.registry import IMAGE_TASKS, TASKS, open_task

Form = Literal["chat", "document"]


class TaskSource:
    """Endless examples of one task.

    In 'chat' form a conversation with loss on all that the assistant says, calls of tools included;
    in 'document' form the images, then question, calls, results and answer, a line each, with loss on
    all text.
    """

    size: int | None = None

    def __init__(
        self,
        task: Task,
        tok: Tokenizer,
        *,
        split: str = "train",
        form: Form = "chat",
        processor: ImageProcessor | None = None,
    ) -> None:
        if form not in ("chat", "document"):
            raise ConfigError(f"form is {form!r}; use chat or document")
        self.name = task.name
        self._task, self._tok, self._processor = task, tok, processor
        self._split, self._form = split, form

    def example(self, index: int) -> Example:
        item = self._task.item(index, self._split)
        if not item.answer:
            raise DataError(f"{self.name}: an item has no answer to train on; remedy: give it one")
        if self._form == "document":
            text, pictures = _plain(item)
            ids = self._tok.encode(text)
            return illustrated(pictures, ids, self._tok, self._processor, self.name)
        rendered = chat.render(
            item.conversation(),
            self._tok,
            tools=item.tools,
            add_generation_prompt=False,
            processor=self._processor,
        )
        return Example(rendered.ids, rendered.loss_mask, joined(rendered.tiles), self.name)


def makers(form: Form = "chat") -> dict[str, Maker]:
    """What `--data` may name besides built-in data and files: 'tasks', each task, and FILE.py:Class."""
    return _Makers(
        {"tasks": partial(_all, form), **{name: partial(_one, name, form) for name in TASKS}}, form
    )


class _Makers(dict[str, Maker]):
    """By name; a task of a Python file is made when it is asked for."""

    def __init__(self, known: dict[str, Maker], form: Form) -> None:
        super().__init__(known)
        self._form: Form = form

    def __missing__(self, name: str) -> Maker:
        if ".py:" in name:
            return partial(_one, name, self._form)
        raise KeyError(name)


def _one(name: str, form: Form, opening: Opening) -> Weighted:
    side = None if opening.processor is None else opening.processor.size
    task = open_task(name, opening.seed, side)
    source = TaskSource(
        task, opening.tok, split=opening.split, form=form, processor=opening.processor
    )
    return [(source, 1.0)]


def _all(form: Form, opening: Opening) -> Weighted:
    blind = opening.processor is None
    names = [name for name in TASKS if not (blind and name in IMAGE_TASKS)]
    return [made for name in names for made in _one(name, form, opening)]


def _plain(item: Item) -> tuple[str, list[Image.Image]]:
    """The text of all turns and the answer, a line each, and the pictures in order."""
    lines: list[str] = []
    pictures: list[Image.Image] = []
    for message in item.conversation():
        content = message.get("content") or []
        parts: list[dict[str, Any]] = (
            [{"type": "text", "text": content}] if isinstance(content, str) else content
        )
        lines += [part["text"] for part in parts if part["type"] == "text"]
        pictures += [part["image"] for part in parts if part["type"] == "image"]
        if calls := message.get("tool_calls"):
            functions = [call["function"] for call in calls]
            lines.append(
                tool_calls.write([(f["name"], f["arguments"]) for f in functions], "pythonic")
            )
    return "\n".join(lines), pictures
