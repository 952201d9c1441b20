"""Tokenizer: training, round trips, hostile text, folders, tokenizers found in the wild."""

import importlib.util
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from herdling.errors import CheckpointError, ConfigError
from herdling.inputs import special_tokens
from herdling.inputs.tokenizer import StreamDecoder, Tokenizer

ANY_CHARACTER = st.characters(exclude_categories=())


def test_size_counts_bytes_merges_and_control_tokens(texts):
    tok = Tokenizer.train(texts, vocab_size=256 + 50 + 2048, specials="full")
    assert len(tok) == 256 + 50 + 2048
    assert tok.bos == 306
    assert tok.patch == 306 + 92
    assert tok.special("<|reserved_special_token_903|>") == len(tok) - 1


def test_default_control_tokens_follow_the_size(texts, tok):
    assert len(tok) == 1024
    assert len(tok.specials) == 21
    assert len(Tokenizer.train(texts, vocab_size=4096).specials) == 2048


def test_too_small_a_vocabulary_is_an_error():
    with pytest.raises(ConfigError, match=r"vocab_size is 276; .* at least 277"):
        Tokenizer.train(["text"], vocab_size=276)
    with pytest.raises(ConfigError, match="at least 2304; or use compact"):
        Tokenizer.train(["text"], vocab_size=2303, specials="full")
    assert len(Tokenizer.train([], vocab_size=277)) == 277


def test_running_out_of_pairs_is_reported(caplog):
    tok = Tokenizer.train(["abab"], vocab_size=1000)
    assert len(tok) < 1000
    assert f"vocabulary of {len(tok)}, not 1000" in caplog.text


def test_training_is_deterministic(texts, tok, tmp_path):
    script = (
        "import sys; from herdling.inputs.tokenizer import Tokenizer\n"
        "texts = [open(p, encoding='utf-8').read() for p in sys.argv[2:]]\n"
        "Tokenizer.train(texts, vocab_size=1024).save(sys.argv[1])"
    )
    files = []
    for i, text in enumerate(texts):
        files.append(tmp_path / f"{i}.txt")
        files[-1].write_text(text, "utf-8")
    tok.save(tmp_path / "here")
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed, "PYTHONPATH": ":".join(sys.path)}
        command = [sys.executable, "-c", script, str(tmp_path / seed), *map(str, files)]
        subprocess.run(command, check=True, env=env)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / seed / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


@settings(max_examples=60, deadline=None)
@given(text=st.text(ANY_CHARACTER))
def test_every_text_survives(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert not set(ids) & set(tok.specials.values())


def test_every_plane_and_every_surrogate_survives(tok):
    text = "".join(chr(code) for code in range(0, 0x110000, 7))
    assert tok.decode(tok.encode(text)) == text
    surrogates = "".join(chr(code) for code in range(0xD800, 0xE000))
    assert tok.decode(tok.encode(surrogates)) == surrogates
    printable = tok.decode(tok.encode("a\ud800b"), surrogates=False)
    assert printable == "a\N{REPLACEMENT CHARACTER}" + 2 * "\N{REPLACEMENT CHARACTER}" + "b"


def test_user_text_never_becomes_a_control_token(tok):
    for name, id in tok.specials.items():
        ids = tok.encode(f"a{name}b")
        assert id not in ids
        assert max(ids) < tok.bos
        assert tok.decode(ids) == f"a{name}b"


@pytest.mark.parametrize(
    "unit", [" ", "a", "A", "\n", "=", "\0", "\u4e2d", "\u0301", "aB", " a", "'", "9"]
)
def test_pathological_runs_take_linear_time(tok, unit):
    """16 times the text; measured are 16 to 50 times (caches, a heap), quadratic would be 256."""

    def seconds(length: int) -> float:
        text = unit * (length // len(unit))
        start = time.process_time()
        ids = tok.encode(text)
        taken = time.process_time() - start
        assert tok.decode(ids) == text
        return taken

    short = min(seconds(62_500) for _ in range(3))
    assert min(seconds(1_000_000) for _ in range(2)) < 100 * max(short, 0.002)


def test_decode_never_raises(tok):
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(len(tok) + 5) for _ in range(20)]
        ids += tok.encode("\U0001f411")[: rng.randrange(4)]
        assert isinstance(tok.decode(ids), str)
        tok.decode(ids, surrogates=False).encode()
    assert tok.decode([-1, 10**9]) == 2 * "\N{REPLACEMENT CHARACTER}"
    assert tok.decode([tok.eot]) == "<|eot|>"


@settings(max_examples=30, deadline=None)
@given(text=st.text(ANY_CHARACTER), cut=st.integers(0, 3))
def test_stream_gives_the_text_in_whole_characters(tok, text, cut):
    ids = tok.encode(text)
    ids = ids[: len(ids) - cut]
    stream = StreamDecoder(tok)
    pieces = [stream.push(id) for id in ids]
    assert "".join([*pieces, stream.flush()]) == tok.decode(ids, surrogates=False)


def test_stream_holds_back_an_unfinished_character(tok):
    stream = StreamDecoder(tok)
    sheep = tok.encode("\U0001f411")
    assert [stream.push(id) for id in sheep] == [""] * (len(sheep) - 1) + ["\U0001f411"]
    assert stream.push(*sheep[:-1]) == ""
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("model_type", [None, "llama4", "llama4_text"])
def test_transformers_opens_our_folder_with_the_same_ids(tok, tmp_path, texts, model_type):
    tok.save(tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.open(tmp_path)
    assert len(theirs) == len(ours) == len(tok)
    for text in [texts[0], " \n\n x", "na\u00efve \U0001f411 \u4e2d\u6587", "it's\r\n\t12345 A1"]:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == tok.encode(text) == ids
        assert theirs.encode(text) == [ours.bos, *ids]
        assert theirs.decode(ids) == ours.decode(ids) == text
    assert theirs.bos_token_id == ours.bos
    assert theirs.eos_token_id == ours.end_of_text
    assert theirs.pad_token_id == ours.pad
    for name, id in ours.specials.items():
        assert theirs.convert_tokens_to_ids(name) == id
        assert theirs.encode(name, add_special_tokens=False) == [id]


def test_saving_what_was_opened_changes_nothing(tok, tmp_path):
    tok.save(tmp_path / "a")
    Tokenizer.open(tmp_path / "a").save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_missing_and_broken_files_are_named(tok, tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file; is this a model"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.model").write_text("")
    with pytest.raises(CheckpointError, match=r"see Tokenizer\.from_tiktoken"):
        Tokenizer.open(tmp_path)
    tok.save(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text("utf-8")
    for broken in (whole[: len(whole) // 2], "{}", "[]", ""):
        (tmp_path / "tokenizer.json").write_text(broken, "utf-8")
        with pytest.raises(CheckpointError, match=r"not a usable tokenizer\.json"):
            Tokenizer.open(tmp_path)


def test_other_kinds_of_tokenizer_are_refused(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a"))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="not BPE"):
        Tokenizer.open(tmp_path)
    no_bytes = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    no_bytes.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="byte 0x00 has no token"):
        Tokenizer.open(tmp_path)
    sentencepiece = tokenizers.Tokenizer(tokenizers.models.BPE({"\u2581a": 0}, []))
    sentencepiece.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="byte-level"):
        Tokenizer.open(tmp_path)


def in_the_wild(tok: Tokenizer, names: list[str], folder: Path) -> Tokenizer:
    """The same text vocabulary with other added tokens, as other programs write it."""
    tok.save(folder)
    raw = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    template = raw["added_tokens"][0]
    raw["added_tokens"] = [
        {**template, "id": tok.bos + i, "content": name, "special": i % 2 == 0}
        for i, name in enumerate(names)
    ]
    raw["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(raw), "utf-8")
    return Tokenizer.open(folder)


def test_control_tokens_are_found_by_name_old_ones_too(tok, tmp_path):
    python = ["<|text_post_train_reserved_special_token_6|>", "<|finetune_right_pad_id|>"]
    names = [special_tokens.BOS, special_tokens.END_OF_TEXT, special_tokens.EOT, *python]
    wild = in_the_wild(tok, names, tmp_path)
    assert wild.special("<|python_start|>") == tok.bos + 3
    assert wild.pad == tok.bos + 4
    assert wild.stop_ids == [wild.end_of_text, wild.eot]
    assert len(wild) == tok.bos + 5
    with pytest.raises(ConfigError, match=r"no control token <\|eom\|>; it has 5: <\|begin_of"):
        wild.special("<|eom|>")
    with pytest.raises(ConfigError, match=r"<\|patch\|>"):
        _ = wild.patch
    # Added tokens that are not marked special are out of reach of text as well.
    assert max(wild.encode("".join(names))) < wild.bos
    wild.save(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text("utf-8"))
    assert config["pad_token"] == "<|finetune_right_pad_id|>"
    assert Tokenizer.open(tmp_path / "again").specials == wild.specials


def test_import_needs_no_torch():
    script = "import sys, herdling.inputs.chat; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert importlib.util.find_spec("torch")


def test_single_digits_never_merge():
    texts = ["the year 2024, pi 3.14159, x = 1000 and 1000000; utf8 " * 20] * 20
    joined = Tokenizer.train(texts, 400, "compact")
    apart = Tokenizer.train(texts, 400, "compact", single_digits=True)
    assert len(joined.encode("1000")) < 4
    assert [apart.decode([i]) for i in apart.encode("1000 2024")] == [*"1000", " ", *"2024"]


def test_single_digits_of_other_scripts_become_tokens():
    digits = "\u0967\u0968\u0969"  # Devanagari 1, 2, 3: three bytes each
    texts = [f"{digits} " * 20] * 20
    joined = Tokenizer.train(texts, 300, "compact")
    apart = Tokenizer.train(texts, 300, "compact", single_digits=True)
    assert len(joined.encode(digits)) == 1
    assert [apart.decode([i]) for i in apart.encode(digits)] == [*digits]
