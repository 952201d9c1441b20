"""Meta's file form: the same ids as tiktoken gives, the control tokens of a 200,000-rank file."""

import base64
import itertools
import random

import pytest
import tiktoken

from herdling.errors import CheckpointError
from herdling.inputs.tiktoken_file import read_ranks
from herdling.inputs.tokenizer import SPLIT_PATTERN, Tokenizer


def write(path, tokens):
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    path.write_bytes(b"".join(lines))
    return path


def trained_tokens(tok):
    return [tok.to_bytes([id]) for id in range(tok.bos)]


def test_ids_are_those_of_tiktoken(tok, texts, tmp_path):
    path = write(tmp_path / "tokenizer.model", trained_tokens(tok))
    ours = Tokenizer.from_tiktoken(path)
    theirs = tiktoken.Encoding(
        "toy",
        pat_str=SPLIT_PATTERN,
        mergeable_ranks=read_ranks(path),
        special_tokens={"<|eot|>": 10**6},
    )
    rng = random.Random(0)
    alphabets = ["ab ", "aA'st \n", "=-_*# \r\n/", "\u4e2d\u0301\u0e01\U0001f411 x", "0123456789,"]
    drawn = ("".join(rng.choices(a, k=rng.randrange(80))) for a in alphabets * 200)
    for text in itertools.chain(texts, drawn, ["<|eot|>"]):
        assert ours.encode(text) == theirs.encode(text, disallowed_special=())


def test_ids_of_a_file_as_large_as_the_original(tmp_path):
    singles = [bytes([byte]) for byte in range(256)]
    pairs = [bytes(pair) for pair in itertools.product(range(256), repeat=2)]
    letters = [bytes(word) for word in itertools.product(b"abcdefghijk", repeat=5)]
    tokens = (singles + pairs + letters)[:200_000]
    tok = Tokenizer.from_tiktoken(write(tmp_path / "tokenizer.model", tokens))
    assert len(tok) == 202_048
    assert (tok.bos, tok.end_of_text, tok.eom, tok.eot) == (200000, 200001, 200007, 200008)
    assert (tok.pad, tok.patch, tok.special("<|image|>")) == (200018, 200092, 200090)
    assert tok.special("<|python_start|>") == 200016
    assert tok.special("<|reserved_special_token_903|>") == 202047
    assert tok.stop_ids == [200001, 200007, 200008]
    assert tok.encode("abcde") == [tokens.index(b"abcde")]


def test_converted_file_survives_a_folder(tok, texts, tmp_path):
    ours = Tokenizer.from_tiktoken(write(tmp_path / "m", trained_tokens(tok)), specials="compact")
    ours.save(tmp_path / "folder")
    again = Tokenizer.open(tmp_path / "folder")
    assert again.specials == ours.specials == tok.specials
    assert again.encode(texts[1]) == ours.encode(texts[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"AA== 0\nnot a line\n", "line 2 is not"),
        (b"AA== 0\n\nA* 1\n", "line 3 is not"),
        (b"\x80\x03 pickle", "line 1 is not"),
        (b"AA== 0\nAQ== 2\n", "ranks are not 0, 1, 2"),
        (b"AA== 0\nAA== 1\n", "ranks are not 0, 1, 2"),
        (b"AA== 0\nAQ== 1\n", "byte 0x02 has no token"),
    ],
)
def test_broken_files_name_the_place(tmp_path, content, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_tiktoken(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="none: cannot be read: No such file"):
        Tokenizer.from_tiktoken(tmp_path / "none")
