"""Records of every form, and what is said about those that are broken."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from herdling.data.records import (
    PICTURES,
    InMemory,
    JsonLines,
    image_folder,
    only_text,
    parquet_rows,
)
from herdling.errors import DataError
from herdling.inputs.image_files import FORMATS, open_image

REPLY = {"role": "assistant", "content": "yo"}
URI = "data:image/png;base64,AAAA" + "/" * 5000
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(records: JsonLines | InMemory) -> list[dict[str, Any]]:
    return [records.read(i)[2] for i in range(len(records.sizes))]


def test_json_lines_are_read_where_they_lie(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "eins"}\n\n  \n'
        + json.dumps(CHAT).encode()
        + b'\r\n{"text": "\\ud800"}'
    )
    records = JsonLines([path])
    assert read(records) == [{"text": "eins"}, CHAT, {"text": "\ud800"}]
    assert list(records.sizes) == [4, -1, 1]
    assert not only_text(records)
    assert [records.read(i)[0] for i in range(3)] == [f"{path}:{line}" for line in (1, 4, 5)]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": "a"', "not valid JSON: Expecting ',' delimiter at column 13"),
        ("[1]", "is list; each record must be a JSON object"),
        ('{"txt": "a"}', "has txt; a record has either 'text' or 'messages'"),
        ('{"text": "a", "messages": []}', "has messages, text; a record has either"),
        ('{"text": 3}', "text is int; it must be a string"),
        ('{"text": "a", "images": "x.png"}', "images must be a list of paths"),
        ('{"text": "a", "images": ["no.png"]}', "no.png is not a file"),
        ('{"messages": ["hi"]}', "messages must be a list of objects"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message has role 'assistant'"),
        ("[" * 100_000, "not valid JSON"),
        ('{"text": "a", "text": "b"}', "not valid JSON: 'text' stands there twice"),
        ('{"text": "a", "image": "no.png"}', "no.png is not a file"),
    ],
)
def test_a_broken_line_is_named_by_file_and_line(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n{{"text": "fine"}}\n')
    with pytest.raises(DataError, match=r"data.jsonl:3: ") as caught:
        JsonLines([path])
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ({"role": "human", "content": "a"}, "messages[0] has role 'human'; use one of system"),
        ({"role": ["user"], "content": "a"}, "messages[0] has role ['user']"),
        ({"role": "user"}, "messages[0] has no content"),
        ({"role": "user", "content": 5}, "messages[0].content is int"),
        ({"role": "user", "content": [{"type": "txt"}]}, "messages[0].content[0] must be"),
        ({"role": "user", "content": ["a"]}, "messages[0].content[0] must be"),
        ({**REPLY, "tool_calls": [{"name": "f", "arguments": "{"}]}, "arguments are not JSON"),
        ({**REPLY, "tool_calls": [{"arguments": {}}]}, "has no usable function name"),
        ({"role": "assistant", "text": "yo"}, "messages[0] has neither content nor tool_calls"),
        (
            {**REPLY, "content": None, "function_call": {"name": "f"}},
            "messages[0] has a function_call, which",
        ),
        (
            {**REPLY, "content": None, "refusal": "no"},
            "messages[0] has a refusal, which is not read",
        ),
        ({**REPLY, "weight": 0.5}, "messages[0].weight is 0.5; it must be 0 or 1"),
        ({"image": "http://a.org/b.png"}, "image 'http://a.org/b.png' is a URL"),
        ({"image_url": {"url": "https://a.org/b.png"}}, "image 'https://a.org/b.png' is a URL"),
        ({"image_url": {"url": "no.png"}}, "no.png is not a file"),
        ({"image_url": "no.png"}, "no.png is not a file"),
        ({"image": "x" * 5000}, "is not a file"),
        ({"image": "nul\0"}, "is not a file"),
        ({"image": 5}, "image is int; it must be a path or a data URI"),
        ({"image": {"path": "a.png"}}, "messages[0] has an image part without an image"),
        ({}, "messages[0] has an image part without an image"),
    ],
)
def test_a_message_that_cannot_be_rendered_is_refused_at_once(
    tmp_path: Path, said: dict[str, Any], complaint: str
) -> None:
    if "role" not in said:
        said = {"role": "user", "content": [{"type": "image_url", **said}]}
    path = write(tmp_path / "data.jsonl", CHAT, {"messages": [said, REPLY]})
    with pytest.raises(DataError, match=r"data.jsonl:2: ") as caught:
        JsonLines([path])
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ({"tools": [{"description": "nameless"}]}, "tools[0] has no usable name"),
        ({"tools": 5}, "tools must be a list of JSON objects"),
        ({"tools": {"name": "f"}}, "tools must be a list of JSON objects"),
        ({"images": ["cat.png"]}, "{'type': 'image', 'image': 'cat.png'} parts into the content"),
        ({"images": 5}, "has images beside messages"),
        ({"images": {}}, "has images beside messages"),
        ({"image": "cat.png"}, "has image beside messages"),
        ({"tools": "["}, "tools is not JSON"),
    ],
)
def test_what_stands_beside_messages_is_checked(
    tmp_path: Path, extra: dict[str, Any], complaint: str
) -> None:
    path = write(tmp_path / "data.jsonl", CHAT, {**CHAT, **extra})
    with pytest.raises(DataError, match=r"data.jsonl:2: ") as caught:
        JsonLines([path])
    assert complaint in str(caught.value)


@pytest.mark.parametrize("images", [5, 0, {}, {"path": "a.png"}, [{"path": "a.png"}], [5], [None]])
def test_images_of_a_document_are_paths(tmp_path: Path, images: Any) -> None:
    path = write(tmp_path / "data.jsonl", {"text": "fine"}, {"text": "a", "images": images})
    with pytest.raises(DataError, match=r"data.jsonl:2: images must be a list of paths"):
        JsonLines([path])


def test_what_is_right_passes(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    parts = [{"type": "image", "image": "a.png"}, {"type": "image_url", "image_url": {"url": URI}},
             {"type": "text", "text": "what is http://a.org?", "image": ""}]  # fmt: skip
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    calls = [{"role": "assistant", "content": None, "tool_calls": [call]}, REPLY]
    chat = {"messages": [{"role": "user", "content": parts}, *calls], "tools": [{"name": "f"}]}
    bare = {**CHAT, "tools": None, "images": None, "text": None, "chosen": None, "split": None}
    document = {"text": "b", "images": [URI, str(tmp_path / "a.png"), "a.png"]}
    path = write(tmp_path / "data.jsonl", chat, bare, {**CHAT, "images": []}, document)
    assert len(JsonLines([path]).sizes) == 4


def test_a_picture_of_a_document_may_stand_alone(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path = write(tmp_path / "data.jsonl", {"text": "b", "image": "a.png"})
    assert read(JsonLines([path])) == [{"text": "b", "images": ["a.png"]}]


def test_every_suffix_of_a_picture_can_be_read() -> None:
    known = Image.registered_extensions()
    assert {known[suffix] for suffix in PICTURES} == set(FORMATS)


def test_broken_utf8_in_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"data.jsonl:2: byte 0xe9 is not UTF-8"):
        JsonLines([path])
    assert read(JsonLines([path], errors="replace"))[1] == {"text": "caf\ufffd"}


def test_splits_go_by_content_and_share_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *({"text": f"text {i % 60}"} for i in range(120)))
    splits = [{r["text"] for r in read(JsonLines([path], s))} for s in ("train", "validation", "test")]  # fmt: skip
    assert sum(len(s) for s in splits) == 60
    assert len(set().union(*splits)) == 60


def test_parquet_says_the_same_as_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"text": f"row {i}", "extra": i} for i in range(10)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read(InMemory(parquet_rows([path]))) == [{"text": row["text"]} for row in rows]
    chats = tmp_path / "b.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([CHAT, {"messages": None, "text": "t"}], schema=pyarrow.schema([
        ("text", pyarrow.string()),
        ("messages", pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))),
    ])), chats)  # fmt: skip
    assert read(InMemory(parquet_rows([chats]))) == [CHAT, {"text": "t"}]
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "a"}, {"text": None}]), path)
    with pytest.raises(DataError, match=r"a.parquet: row 1: has nothing; a record has either"):
        InMemory(parquet_rows([path]))
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"a.parquet: row 0: not readable as Parquet"):
        InMemory(parquet_rows([path]))


def test_what_a_table_adds_to_a_row_is_left_out(tmp_path: Path) -> None:
    """Every object of a column has the fields of all, null where a row has none; pictures are bytes."""
    calls = [{"function": {"name": "f", "arguments": {name: 1}}} for name in "ab"]
    tools = [
        {"name": "f", "parameters": {"properties": {name: {"type": "number"}}}} for name in "ab"
    ]
    chats = [{"messages": [CHAT["messages"][0], {"role": "assistant", "tool_calls": [call]}], "tools": tools}
             for call in calls]  # fmt: skip
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(chats), path)
    assert read(InMemory(parquet_rows([path]))) == chats
    picture = Image.new("RGB", (8, 8))
    picture.save(tmp_path / "a.png")
    stored = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "cat", "image": stored}]), path)
    ((uri,),) = [record["images"] for record in read(InMemory(parquet_rows([path])))]
    assert open_image(uri).tobytes() == picture.tobytes()


def test_image_folders_with_either_kind_of_caption(tmp_path: Path) -> None:
    for name in ("a.png", "sub/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"this is {name}\n")
    found = InMemory(image_folder(tmp_path))
    assert read(found) == [
        {"text": "this is a.png", "images": ["a.png"]},
        {"text": "this is sub/b.jpg", "images": ["b.jpg"]},
    ]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a.png: has no caption; remedy: write a.txt beside it"):
        InMemory(image_folder(tmp_path))
    write(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "listed"})
    assert read(InMemory(image_folder(tmp_path))) == [{"text": "listed", "images": ["a.png"]}]
    write(tmp_path / "metadata.jsonl", {"file_name": "gone.png", "text": "listed"})
    with pytest.raises(DataError, match=r"metadata.jsonl:1: image .*gone.png is not a file"):
        InMemory(image_folder(tmp_path))
    write(tmp_path / "metadata.jsonl", {"name": "a.png"})
    with pytest.raises(DataError, match=r"metadata.jsonl:1: has no file_name"):
        InMemory(image_folder(tmp_path))


def test_a_broken_byte_of_a_caption(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"a.txt:1: byte 0xe9 is not UTF-8"):
        InMemory(image_folder(tmp_path))
    found = InMemory(image_folder(tmp_path, "replace"))
    assert read(found) == [{"text": "caf\ufffd", "images": ["a.png"]}]
