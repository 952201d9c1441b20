"""import-meta and export --to meta as commands, there and back; and export --to hf.

Run: python -m pytest tests/recipes/test_import_meta.py
"""

import base64
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from herdling import cli
from herdling.checkpoint import Card, Folder, open_model, save_model
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.config import ModelConfig, preset
from herdling.model.init import initialize
from herdling.model.llama import build


def toy(tok: Tokenizer | None, kind: str = "scout", vision: bool = True) -> ModelConfig:
    """Scout- or Maverick-like with the ids of a tokenizer; heads that two files can share."""
    changes = dict(interleave_moe_layer_step=2, use_qk_norm=False) if kind == "maverick" else {}
    config = preset("nano", vision=vision, vocab_size=len(tok) if tok else 320, head_dim=16,
                    hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
                    initializer_range=0.02,  # params.json does not record it
                    **changes)  # fmt: skip
    if tok is None:
        return config
    text = replace(config.text, bos_token_id=tok.bos, eos_token_id=tuple(tok.stop_ids),
                   pad_token_id=tok.pad)  # fmt: skip
    return replace(
        config,
        text=text,
        image_token_index=tok.patch,
        boi_token_index=tok.special("<|image_start|>"),
        eoi_token_index=tok.special("<|image_end|>"),
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}


def assert_equal(one: Path, other: Path) -> None:
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    assert all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(["the quick brown fox jumps over the lazy dog"] * 9, vocab_size=300)


@pytest.fixture
def meta_vocabulary(tmp_path) -> Path:
    """A tokenizer.model: 256 bytes and two merges, in tiktoken's form."""
    ranks = [bytes([b]) for b in range(256)] + [b"th", b"the"]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)]
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    return tmp_path / "tokenizer.model"


def saved(folder: Path, config: ModelConfig, tok: Tokenizer | None, **how) -> Path:
    how.setdefault("card", Card("toy", license="apache-2.0").after("pretrain"))
    save_model(initialize(build(config)), config, folder, tok, **how)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_there_and_back_is_bit_exact(tmp_path, tok, kind, ranks, dtype):
    config = toy(tok, kind)
    start, meta, back = (
        saved(tmp_path / "a", config, tok, dtype=dtype),
        tmp_path / "m",
        tmp_path / "b",
    )
    assert cli.main(["export", str(start), str(meta), "--to", "meta", "--model-parallel", str(ranks)]) == 0  # fmt: skip
    assert sorted(p.name for p in meta.glob("*.pth")) == [f"consolidated.{r:02d}.pth" for r in range(ranks)]  # fmt: skip
    positions = str(config.text.max_position_embeddings)
    assert cli.main(["import-meta", str(meta), str(back), "--max-positions", "0"]) == 2
    assert cli.main(["import-meta", str(meta), str(back), "--max-positions", positions]) == 0
    assert_equal(start, back)
    assert open_model(back)[1] == config
    assert Tokenizer.open(back).encode("the fox") == tok.encode("the fox")
    stages = [step.stage for step in Card.open(back, config).steps]
    assert stages == ["pretrain", "export", "import-meta"]
    assert not Card.open(back, config).llama  # the card in the Meta folder says whose weights


def test_metas_vocabulary_is_converted_and_its_licence_noted(tmp_path, meta_vocabulary, capsys):
    tok = Tokenizer.from_tiktoken(meta_vocabulary)
    start = saved(tmp_path / "a", toy(tok), tok)
    meta, back = tmp_path / "m", tmp_path / "b"
    assert cli.main(["export", str(start), str(meta), "--to", "meta"]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "README.md"):
        (meta / name).unlink()
    (meta / "tokenizer.model").write_bytes(meta_vocabulary.read_bytes())
    assert cli.main(["import-meta", str(meta), str(back)]) == 0
    assert "Built with Llama" in capsys.readouterr().out
    assert Tokenizer.open(back).encode("the") == [257]
    config = Folder.open(back).config
    assert (config.image_token_index, config.text.bos_token_id) == (tok.patch, tok.bos)
    assert config.text.max_position_embeddings == 1048576
    assert Card.open(back, config).llama
    assert (back / "NOTICE").exists()
    assert "# Llama-b" in (back / "README.md").read_text("utf-8")
    assert_equal(start, back)


def test_a_strange_vocabulary_needs_its_tokenizer(tmp_path, tok, capsys):
    start = saved(tmp_path / "a", toy(tok), tok)
    meta, back = tmp_path / "m", tmp_path / "b"
    assert cli.main(["export", str(start), str(meta), "--to", "meta"]) == 0
    (meta / "tokenizer.json").unlink()
    assert cli.main(["import-meta", str(meta), str(back)]) == 1
    assert "give --tokenizer" in capsys.readouterr().err
    assert not back.exists()
    assert cli.main(["import-meta", str(meta), str(back), "--tokenizer", str(start)]) == 0
    assert_equal(start, back)


def test_import_in_another_type(tmp_path, tok):
    start = saved(tmp_path / "a", toy(tok), tok)
    assert cli.main(["export", str(start), str(tmp_path / "m"), "--to", "meta"]) == 0
    assert cli.main(["import-meta", str(tmp_path / "m"), str(tmp_path / "b"), "--dtype", "bfloat16"]) == 0  # fmt: skip
    expected = {n: t.bfloat16() for n, t in tensors(start).items()}
    assert all(torch.equal(expected[n], t) for n, t in tensors(tmp_path / "b").items())
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_failed_import_leaves_nothing(tmp_path, tok, capsys):
    start = saved(tmp_path / "a", toy(tok), tok)
    assert cli.main(["export", str(start), str(tmp_path / "m"), "--to", "meta"]) == 0
    held = torch.load(tmp_path / "m" / "consolidated.00.pth", weights_only=True)
    del held["output.weight"]
    torch.save(held, tmp_path / "m" / "consolidated.00.pth")
    assert cli.main(["import-meta", str(tmp_path / "m"), str(tmp_path / "b")]) == 1
    assert "lm_head.weight is missing" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["a", "m"]


def test_what_is_read_or_holds_other_things_is_not_replaced(tmp_path, tok, capsys):
    start, meta = saved(tmp_path / "a", toy(tok), tok), tmp_path / "downloads" / "m"
    assert cli.main(["export", str(start), str(meta), "--to", "meta"]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for out in (meta, meta.parent):
        assert cli.main(["import-meta", str(meta), str(out)]) == 2
        assert "is or holds" in capsys.readouterr().err
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    assert cli.main(["import-meta", str(meta), str(tmp_path / "runs")]) == 2
    assert "runs holds demo, no part of a model" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert (tmp_path / "runs" / "demo").is_dir()


def test_a_tokenizer_that_is_asked_for_must_be_there(tmp_path, tok, capsys):
    start, meta = saved(tmp_path / "a", toy(tok), tok), tmp_path / "m"
    assert cli.main(["export", str(start), str(meta), "--to", "meta"]) == 0
    (tmp_path / "empty").mkdir()
    for given in ("tokenzier.model", "empty"):
        args = ["import-meta", str(meta), str(tmp_path / "b"), "--tokenizer", str(tmp_path / given)]
        assert cli.main(args) == 2
        assert f"{given} is no file, and no folder with tokenizer.model" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
