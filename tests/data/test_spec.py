"""What `--data` may say."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from herdling.data.sources import InMemory, TextSource
from herdling.data.spec import Opening, Weighted, open_sources, parse
from herdling.data.split import SPLITS, split_of
from herdling.errors import ConfigError, DataError
from herdling.inputs.images import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer

TOK = Tokenizer.train(["hello"], 300)
PROCESSOR = ImageProcessor(size=32, patch_size=4)


def test_parse() -> None:
    assert parse("builtin") == [("builtin", 1.0)]
    assert parse("code:2, english:1.5") == [("code", 2.0), ("english", 1.5)]
    assert parse("a/b:c.txt:.5,C:/x.jsonl") == [("a/b:c.txt", 0.5), ("C:/x.jsonl", 1.0)]
    with pytest.raises(ConfigError, match="data is 'code,,a', which has an empty part"):
        parse("code,,a")
    with pytest.raises(ConfigError, match="weight of code is 0; it must be above 0"):
        parse("code:0")


def test_builtin_holds_pictures_for_a_model_that_sees() -> None:
    blind = open_sources("builtin", Opening(TOK, length=64))
    assert [source.name for source, _ in blind] == ["code", "english", "multilingual"]
    seeing = open_sources("builtin:2", Opening(TOK, length=64, processor=PROCESSOR))
    assert sum(weight for _, weight in seeing) == pytest.approx(2)
    assert "picture/number" in [source.name for source, _ in seeing]
    for source, _ in seeing:
        example = source.example(3)
        assert example.tokens == source.example(3).tokens
        assert len(example.tokens) == len(example.loss_mask)
        patches = example.tokens.count(TOK.patch)
        tiles = 0 if example.tiles is None else len(example.tiles)
        assert patches == tiles * PROCESSOR.tokens_per_tile
        assert (tiles > 0) == source.name.startswith("picture/")
    with pytest.raises(ConfigError, match="data picture/number: the model has no vision"):
        open_sources("picture/number", Opening(TOK))


def test_files_of_every_kind(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    (tmp_path / "plain.jsonl").write_text('{"text": "plain"}\n')
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}))
    (tmp_path / "cats").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "cats" / "1.png")
    (tmp_path / "cats" / "1.txt").write_text("a cat")
    opening = Opening(TOK, split="all", processor=PROCESSOR)
    spec = ",".join(str(tmp_path / n) for n in ("*.txt:2", "plain.jsonl", "chat.jsonl", "cats"))
    (texts, weight), (plain, _), (chat, _), (cats, _) = open_sources(spec, opening)
    assert (texts.size, weight) == (3, 2.0)
    assert sorted(TOK.decode(texts.example(i).tokens[1:-1]) for i in range(3)) == [f"text {i}" for i in range(3)]  # fmt: skip
    assert isinstance(plain, TextSource)
    assert all(plain.example(0).loss_mask)
    assert not all(chat.example(0).loss_mask)
    assert cats.example(0).tiles is not None
    assert cats.name == str(tmp_path / "cats")


def test_a_table_is_opened(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["hello"]}), tmp_path / "t.parquet")
    ((source, _),) = open_sources(str(tmp_path / "t.parquet"), Opening(TOK, split="all"))
    assert TOK.decode(source.example(0).tokens[1:-1]) == "hello"


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="data 'cde' is neither a file nor a known name; did you mean code"
    ):
        open_sources("cde", Opening(TOK))
    for name, message in (
        ("no/*.txt", r"data 'no/\*.txt': no such file"),
        ("no.txt", "data 'no.txt': no such file"),
        ("code:x", "weight of code is 'x'; it must be a number above 0"),
        ("code:-1", "weight of code is '-1'; it must be a number above 0"),
        ("code:1e999", "weight of code is inf; it must be above 0 and finite"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_sources(name, Opening(TOK))
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"a.json: one JSON value is no stream of records"):
        open_sources(str(tmp_path / "a.json"), Opening(TOK))
    (tmp_path / "a.json").unlink()
    for packed, message in (("a.jsonl.gz", "a packed file"), ("a.arrow", "an Arrow file")):
        (tmp_path / packed).write_text("a")
        with pytest.raises(ConfigError, match=f"{packed}: {message} is not read"):
            open_sources(str(tmp_path / packed), Opening(TOK))
        (tmp_path / packed).unlink()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    with pytest.raises(ConfigError, match=r"matches JSON lines and text files; name one kind each"):
        open_sources(f"{tmp_path}/*", Opening(TOK))
    with pytest.raises(DataError, match="no captioned picture of split 'train'; for text files"):
        open_sources(str(tmp_path), Opening(TOK))
    where = split_of("a")
    assert len(open_sources(f"{tmp_path}/a.txt", Opening(TOK, split=where))) == 1
    for other in set(SPLITS) - {where}:
        with pytest.raises(
            DataError, match="no text; remedy: name other files, or set split to all"
        ):
            open_sources(f"{tmp_path}/a.txt", Opening(TOK, split=other))


def test_further_names_can_be_given() -> None:
    def poem(opening: Opening) -> Weighted:
        return [(TextSource("poem", InMemory(["roses"]), opening.tok), 5.0)]

    found = open_sources("poem:2,code", Opening(TOK), {"poem": poem})
    assert [(source.name, weight) for source, weight in found] == [("poem", 2.0), ("code", 1.0)]
