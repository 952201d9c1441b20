"""The tokenizer verb: any data spec to a folder that transformers opens."""

import json
from dataclasses import replace

import pytest
from PIL import Image
from transformers import AutoTokenizer

from herdling.data.split import split_of
from herdling.errors import ConfigError, DataError
from herdling.inputs import chat
from herdling.inputs.tokenizer import Tokenizer
from herdling.recipes.tokenizer import Config, main, read_texts


@pytest.fixture
def prose(tmp_path):
    lines = [f"sheep number {i} jumps over fence {i * i}\n" for i in range(4000)]
    (tmp_path / "prose.txt").write_text("".join(lines), "utf-8")
    return str(tmp_path / "prose.txt")


def test_folder_is_complete_and_the_same_each_time(prose, tmp_path, capsys):
    for name in ("a", "b"):
        main(Config(prose, tmp_path / name, vocab_size=400))
    ours = Tokenizer.open(tmp_path / "a")
    assert len(ours) == 400
    assert "a: 400 tokens (21 control)" in capsys.readouterr().out
    theirs = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert theirs.encode("sheep jumps", add_special_tokens=False) == ours.encode("sheep jumps")
    assert theirs.chat_template == chat.template()
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_texts_come_by_weight_and_stop_at_the_limit(prose, tmp_path):
    lines = "".join(f"goat number {i} climbs\n" for i in range(40_000))
    (tmp_path / "goats.txt").write_text(lines, "utf-8")
    texts = list(read_texts(f"{prose},{tmp_path / 'goats.txt'}:3", limit=300_000))
    size = [len(text.encode()) for text in texts]
    assert 299_990 < sum(size) <= 300_000
    sheep = sum(n for n, text in zip(size, texts, strict=True) if "sheep number" in text)
    # A share holds to within one document, here a part of 64 KiB.
    assert abs(sheep - 75_000) < 70_000


def test_finite_data_is_read_once_and_unchanged(tmp_path):
    question, answer = "na\u00efve \u4e2d\U0001f411<|eot|>\n", "x\r\n\ty\n"
    talks = [
        [{"role": "user", "content": f"{question}{i}"}, {"role": "assistant", "content": answer}]
        for i in range(20)
    ]
    records = [*({"messages": talk} for talk in talks), *({"text": f"text {i}"} for i in range(40))]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    texts = list(read_texts(str(path), limit=10**6))
    plain = [text for text in texts if text.startswith("text ")]
    assert len(plain) == len(set(plain)) > 20
    questions = [text for text in texts if question in text]
    assert len(questions) == len(set(questions)) > 8
    assert sum(text.endswith(answer) for text in texts) == len(questions)


def test_pictures_are_left_out_and_their_text_read(tmp_path):
    for i in range(12):
        Image.new("RGB", (90, 40)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"caption {i}")
    records = []
    for i in range(12):
        image = {"type": "image", "image": f"{i}.png"}
        asked = {"role": "user", "content": [image, {"type": "text", "text": f"question {i}"}]}
        records.append({"messages": [asked, {"role": "assistant", "content": f"answer {i}"}]})
        records.append({"text": f"document {i}", "images": ["0.png", "1.png"]})
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    texts = list(read_texts(f"{tmp_path},{path}", limit=10**6, split="all"))
    for what in ("caption", "question", "answer", "document"):
        found = {text for text in texts if what in text}
        assert {text.removeprefix("\n\n") for text in found} == {f"{what} {i}" for i in range(12)}


def test_rendered_pictures_give_captions_and_builtin_is_its_texts():
    assert any("Bar chart" in text for text in read_texts("picture/chart", limit=2000))
    builtin = list(read_texts("builtin", limit=50_000))
    assert list(read_texts("builtin:2", limit=50_000)) == builtin
    assert not any("Bar chart" in text for text in builtin)


def test_a_file_of_one_document_and_one_with_broken_bytes_can_be_read(tmp_path):
    path = tmp_path / "a.txt"
    text = next(t for t in map(str, range(1000)) if split_of(t) == "test")
    path.write_text(text)
    with pytest.raises(DataError, match="remedy: name other files, or set split to all"):
        list(read_texts(str(path), limit=100))
    assert list(read_texts(str(path), limit=100, split="all")) == [text]
    path.write_bytes(b"caf\xe9 " * 500)
    settings = Config(str(path), tmp_path / "out", vocab_size=300, split="all")
    with pytest.raises(DataError, match="set encoding_errors to replace"):
        main(settings)
    main(replace(settings, encoding_errors="replace"))
    tok = Tokenizer.open(tmp_path / "out")
    assert len(tok.encode("caf\ufffd")) < 6  # merged, so it was read


def test_the_limit_does_not_tear_characters(tmp_path):
    for name in "abcdefgh":
        (tmp_path / f"{name}.txt").write_text("\U0001f411" * 100 + name, "utf-8")
    [text] = read_texts(str(tmp_path / "*.txt"), limit=7)
    assert text == "\U0001f411"


def test_impossible_requests_are_refused(prose, tmp_path):
    with pytest.raises(ConfigError, match="vocab_size is 200"):
        main(Config(prose, tmp_path / "out", vocab_size=200))
    with pytest.raises(ConfigError, match="limit is 0"):
        main(Config(prose, tmp_path / "out", limit=0))
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ConfigError, match=r"out is .*file"):
            main(Config(prose, out))
    with pytest.raises(ConfigError, match="neither a file nor a known name"):
        main(Config("nothing", tmp_path / "out"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a model"):
        main(Config(prose, tmp_path / "out", vocab_size=400))
