"""Records as examples: what carries loss, where images come from, and errors that name the line."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from herdling.data.record_source import RecordSource
from herdling.data.records import JsonLines
from herdling.errors import DataError
from herdling.inputs.images import ImageProcessor, tile
from herdling.inputs.tokenizer import Tokenizer

TOK = Tokenizer.train(["user assistant hello"], 300)
PROCESSOR = ImageProcessor(size=16, patch_size=4)


def source(tmp_path: Path, *records: Any, processor: ImageProcessor | None = PROCESSOR) -> RecordSource:  # fmt: skip
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return RecordSource("d", JsonLines([path]), TOK, processor=processor)


def test_a_conversation_carries_loss_on_what_the_assistant_says(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    parts = [{"type": "image", "image": "red.png"}, {"type": "text", "text": "what?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "hello"}]
    example = source(tmp_path, {"messages": turns}).example(0)
    asked = [t for t, loss in zip(example.tokens, example.loss_mask, strict=True) if loss]
    assert asked == [*TOK.encode("hello"), TOK.eot]
    assert example.tokens.count(TOK.patch) == PROCESSOR.tokens_per_tile
    assert example.tiles is not None
    want = tile(Image.new("RGB", (16, 16), "red"), PROCESSOR).pixel_values
    assert torch.equal(example.tiles, want)


def test_a_document_puts_its_images_first(tmp_path: Path) -> None:
    for name, size in (("a.png", (16, 16)), ("b.png", (40, 16))):
        Image.new("RGB", size).save(tmp_path / name)
    example = source(tmp_path, {"text": "two", "images": ["a.png", "b.png"]}).example(0)
    assert example.tiles is not None
    tiles = len(example.tiles)
    assert tiles > 2
    assert example.tokens.count(TOK.patch) == tiles * PROCESSOR.tokens_per_tile
    asked = [t for t, loss in zip(example.tokens, example.loss_mask, strict=True) if loss]
    assert asked == [*TOK.encode("two"), TOK.end_of_text]


@pytest.mark.parametrize("spelling", ["image", "image_url", "image_url.url", "data URI"])
def test_images_come_in_every_spelling(tmp_path: Path, spelling: str) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    uri = "data:image/png;base64," + base64.b64encode((tmp_path / "red.png").read_bytes()).decode()
    part = {
        "image": {"type": "image", "image": "red.png"},
        "image_url": {"type": "image_url", "image_url": "red.png"},
        "image_url.url": {"type": "image_url", "image_url": {"url": "red.png"}},
        "data URI": {"type": "image_url", "image_url": {"url": uri}},
    }[spelling]
    turns = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "hello"}]
    want = tile(Image.new("RGB", (16, 16), "red"), PROCESSOR).pixel_values
    documents = {"text": "red", "images": [uri if spelling == "data URI" else "red.png"]}
    for record in ({"messages": turns}, documents):
        tiles = source(tmp_path, record).example(0).tiles
        assert tiles is not None
        assert torch.equal(tiles, want)


def test_errors_name_the_line(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"data.jsonl:1: has images, but the model has no vision"):
        source(tmp_path, {"text": "t", "images": ["a.png"]}, processor=None).example(0)
    turns = [{"role": "narrator", "content": "x"}, {"role": "assistant", "content": "hello"}]
    with pytest.raises(DataError, match=r"data.jsonl:1: messages\[0\] has role 'narrator'"):
        source(tmp_path, {"messages": turns}).example(0)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"data.jsonl:1: .*a.png"):
        source(tmp_path, {"text": "t", "images": ["a.png"]}).example(0)


def test_a_file_that_changed_is_an_error_not_other_data(tmp_path: Path) -> None:
    found = source(tmp_path, {"text": "a", "images": []}, {"text": "b"})
    (tmp_path / "data.jsonl").write_text('{"text"\n')
    with pytest.raises(DataError, match=r"data.jsonl:\d: not valid JSON"):
        found.example(0)
