"""Tasks as training data: what carries loss, and what `--data` may name."""

import pytest

from herdling.data.loader import Loader
from herdling.data.mixture import Mixture
from herdling.data.spec import Opening, open_sources
from herdling.errors import ConfigError
from herdling.inputs.images import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer
from herdling.tasks.mixture import TaskSource, makers
from herdling.tasks.registry import PREFERENCE_TASKS, TASKS, TEXT_TASKS, TOOL_TASKS, create

TOK = Tokenizer.train(["user assistant what is the number"], 300)
PROCESSOR = ImageProcessor(size=32, patch_size=4)


def asked(example) -> str:
    pairs = zip(example.tokens, example.loss_mask, strict=True)
    return TOK.decode(token for token, loss in pairs if loss)


@pytest.mark.parametrize("name", ["arithmetic", "read_number"])
def test_both_forms_of_a_task(name: str) -> None:
    task = create(name)
    item = task.item(7, "train")
    content = item.messages[0]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    chatted = TaskSource(task, TOK, processor=PROCESSOR).example(7)
    assert asked(chatted) == f"{item.answer}<|eot|>"
    assert text in TOK.decode(chatted.tokens)
    plain = TaskSource(task, TOK, form="document", processor=PROCESSOR).example(7)
    assert asked(plain) == f"{text}\n{item.answer}<|end_of_text|>"
    for example in (chatted, plain):
        assert (example.tiles is not None) == (name == "read_number")
        assert example.domain == name
        assert example.tokens[0] == TOK.bos
    with pytest.raises(ConfigError, match="form is 'poem'; use chat or document"):
        TaskSource(task, TOK, form="poem")  # pyright: ignore[reportArgumentType]


def test_a_spec_names_tasks() -> None:
    blind = open_sources("tasks:2,code", Opening(TOK), makers())
    assert [source.name for source, _ in blind] == [
        *TEXT_TASKS,
        *TOOL_TASKS,
        *PREFERENCE_TASKS,
        "code",
    ]
    assert sum(weight for _, weight in blind[:-1]) == pytest.approx(2)
    seeing = open_sources("tasks", Opening(TOK, "test", processor=PROCESSOR), makers("document"))
    assert [source.name for source, _ in seeing] == list(TASKS)
    for source, _ in seeing:
        want = create(source.name).item(3, "test").answer
        assert asked(source.example(3)).endswith(f"\n{want}<|end_of_text|>")
    with pytest.raises(ConfigError, match="task read_number: the model has no vision"):
        open_sources("read_number", Opening(TOK), makers())


def test_all_tasks_are_packed_into_full_rows() -> None:
    sources = open_sources("tasks", Opening(TOK, processor=PROCESSOR), makers())
    loader = Loader(Mixture(sources), length=1024, batch_size=8, pad=TOK.pad, window_rows=64)
    for _ in range(8):
        batch = next(loader)
        patches = int((batch["input_ids"] == TOK.patch).sum())
        assert patches == len(batch["pixel_values"]) * PROCESSOR.tokens_per_tile > 0
    numbers = loader.numbers()
    assert numbers["fill"] >= 0.97
    for name in TASKS:
        assert numbers[f"share/{name}"] == pytest.approx(1 / len(TASKS), abs=0.02)
