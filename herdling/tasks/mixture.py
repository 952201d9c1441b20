"""Tasks as training data: items with their answers as conversations, or as plain documents.

herdling sft --data tasks                    all tasks, those with pictures if the model sees
herdling sft --data arithmetic:2,languages   single tasks with weights

open_sources("tasks", opening, makers())
"""

from functools import partial
from typing import Any, Literal

from PIL import Image

from herdling.data.record_source import illustrated, joined
from herdling.data.sources import Example
from herdling.data.spec import Maker, Opening, Weighted
from herdling.errors import ConfigError
from herdling.inputs import chat
from herdling.inputs.images import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer
from herdling.tasks.base import Item, Task
from herdling.tasks.registry import IMAGE_TASKS, TASKS, TEXT_TASKS, create

Form = Literal["chat", "document"]


class TaskSource:
    """Endless examples of one task.

    In 'chat' form a conversation with loss on the answer alone; in 'document' form the images, the
    question, a line end and the answer, with loss on all text.
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
        if self._form == "document":
            text, pictures = _plain(item)
            ids = self._tok.encode(text)
            return illustrated(pictures, ids, self._tok, self._processor, self.name)
        answer = {"role": "assistant", "content": item.answer}
        rendered = chat.render(
            [*item.messages, answer],
            self._tok,
            add_generation_prompt=False,
            processor=self._processor,
        )
        return Example(rendered.ids, rendered.loss_mask, joined(rendered.tiles), self.name)


def makers(form: Form = "chat") -> dict[str, Maker]:
    """What `--data` may name besides built-in data and files: 'tasks', and each task."""
    return {"tasks": partial(_all, form), **{name: partial(_one, name, form) for name in TASKS}}


def _one(name: str, form: Form, opening: Opening) -> Weighted:
    settings: dict[str, Any] = {"seed": opening.seed}
    if name in IMAGE_TASKS:
        if opening.processor is None:
            raise ConfigError(f"data {name}: the model has no vision; remedy: one that has")
        settings["side"] = opening.processor.size
    task = create(name, **settings)
    source = TaskSource(
        task, opening.tok, split=opening.split, form=form, processor=opening.processor
    )
    return [(source, 1.0)]


def _all(form: Form, opening: Opening) -> Weighted:
    names = TEXT_TASKS if opening.processor is None else TASKS
    return [made for name in names for made in _one(name, form, opening)]


def _plain(item: Item) -> tuple[str, list[Image.Image]]:
    """The text of all turns and the answer, a line each, and the pictures in order."""
    lines: list[str] = []
    pictures: list[Image.Image] = []
    for message in item.messages:
        content = message["content"]
        parts: list[dict[str, Any]] = (
            [{"type": "text", "text": content}] if isinstance(content, str) else content
        )
        lines += [part["text"] for part in parts if part["type"] == "text"]
        pictures += [part["image"] for part in parts if part["type"] == "image"]
    return "\n".join([*lines, item.answer]), pictures
