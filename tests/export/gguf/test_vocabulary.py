"""The tokenizer in a file gives back the tokenizer.

Run: python -m pytest tests/export/gguf/test_vocabulary.py
"""

import json

import pytest
import tokenizers

from herdling.errors import ConfigError
from herdling.export.gguf.vocabulary import vocabulary
from herdling.inputs import chat
from herdling.inputs.tokenizer import SPLIT_PATTERN, Tokenizer

NASTY = ["", " ", "  a\n\n b", "1234567", "don't", "\u00e9t\u00e9 \U0001f600", "<|eot|>", "a\x00b", "\u0939\u093f"]  # fmt: skip


def test_tokens_and_merges_rebuild_the_encoder(make, tok):
    _, folder = make()
    fields = vocabulary(folder.path, 304)
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == len(set(tokens)) == 304
    assert kinds[300:] == [5] * 4
    normal = {
        text: i for i, (text, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == 1
    }
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
    again = tokenizers.Tokenizer(tokenizers.models.BPE(normal, merges))
    again.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    for text in [*NASTY, "the quick brown fox jumps 123 times"]:
        assert again.encode(text).ids == tok.encode(text)
    assert {t: i for i, t in enumerate(tokens) if kinds[i] == 3} == tok.specials


def test_roles_and_template(make, tok):
    _, folder = make()
    fields = vocabulary(folder.path, 304)
    assert fields["tokenizer.ggml.pre"] == "llama4"
    assert fields["tokenizer.ggml.bos_token_id"] == tok.bos
    assert fields["tokenizer.ggml.eos_token_id"] == tok.end_of_text
    assert fields["tokenizer.ggml.eot_token_id"] == tok.eot
    assert fields["tokenizer.ggml.eom_token_id"] == tok.eom
    assert fields["tokenizer.ggml.padding_token_id"] == tok.pad
    assert fields["tokenizer.chat_template"] == chat.template()


def test_another_split_is_refused(make, tok, tmp_path):
    tok.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    raw = json.loads(file.read_text("utf-8"))
    raw["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W"
    file.write_text(json.dumps(raw), "utf-8")
    assert Tokenizer.open(tmp_path)
    with pytest.raises(ConfigError, match="splits text by"):
        vocabulary(tmp_path, 304)
