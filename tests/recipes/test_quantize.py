"""`herdling quantize` end to end: what it writes, prints, compares and refuses."""

import json
from dataclasses import replace

import pytest
import torch

import herdling
from herdling.checkpoint import Card, Folder, save_model
from herdling.checkpoint import quantize as streaming
from herdling.checkpoint.save import SHARD_BYTES
from herdling.cli import main
from herdling.errors import CheckpointError
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.model.llama import build
from herdling.quant.modules import Matrix
from herdling.quant.schemes import scheme
from herdling.quant.swap import swap
from herdling.recipes.quantize import Config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A nano model with pictures, half of its layers with experts, in several shards."""
    root = tmp_path_factory.mktemp("quantize")
    tok = Tokenizer.train(
        ["the quick brown fox jumps over the lazy dog, and then it sleeps. "] * 4, 320
    )
    config = preset(
        "nano", vocab_size=len(tok), attention_chunk_size=8, interleave_moe_layer_step=2
    )
    config = replace(
        config, image_token_index=tok.patch, boi_token_index=tok.special("<|image_start|>"),
        eoi_token_index=tok.special("<|image_end|>"),
    )  # fmt: skip
    model = initialize(build(config), seed=3, std=0.12).eval()
    path = root / "model"
    save_model(model, config, path, tok, card=Card("toy"), shard_bytes=300_000)
    (root / "text.txt").write_text("the dog jumps over the quick fox and sleeps. " * 60)
    return path


def test_the_default_size_of_files_is_that_of_saving():
    assert Config.__dataclass_fields__["shard_bytes"].default == SHARD_BYTES


def run(folder, tmp_path, *flags: str) -> tuple[int, dict]:
    code = main(["quantize", str(folder), str(tmp_path / "out"), "--json", str(tmp_path / "q.json"), *flags])  # fmt: skip
    file = tmp_path / "q.json"
    return code, json.loads(file.read_text()) if file.exists() else {}


@pytest.mark.parametrize("name", ["w4a8", "mxfp4"])
def test_the_folder_is_the_model_rounded(folder, tmp_path, name, capsys):
    code, told = run(folder, tmp_path, "--format", name, "--shard-bytes", "100000")
    assert code == 0
    lm, plain = herdling.load(tmp_path / "out"), herdling.load(folder)
    report = swap(plain.model, scheme(name))
    ids = [plain.tokenizer.encode("the quick brown fox jumps")]
    assert torch.equal(lm.logits(ids), plain.logits(ids))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert told["quantized_share"] == report.share
    assert 0 < told["kl"] < 2
    out = capsys.readouterr().out
    assert f"{report.share:.1%} of" in out
    assert "opened again with the same logits" in out
    assert lm.card is not None
    assert lm.card.steps[-1].stage == "quantize"


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibration_helps_and_tells_what_experts_saw(folder, tmp_path, method, capsys):
    text = str(folder.parent / "text.txt")
    shared = ("--data", text, "--tokens", "512", "--length", "64")
    _, plain = run(folder, tmp_path, "--format", "int3_g32")
    code, told = run(folder, tmp_path, "--format", "int3_g32", "--method", method, *shared)
    assert code == 0
    assert told["kl"] > 0
    seen = told["tokens_by_expert"]
    assert set(seen) == {"1", "3"}
    assert all(sum(counts) == 512 for counts in seen.values())
    assert "layer 1: calibration tokens by expert: " in capsys.readouterr().out
    code, every = run(folder, tmp_path, "--format", "int3_g32", "--method", method, "--all-experts", *shared)  # fmt: skip
    assert code == 0
    assert every["kl"] != told["kl"]
    assert plain["tokens_by_expert"] == {}


def test_chosen_targets_and_other_types(folder, tmp_path):
    code, told = run(
        folder,
        tmp_path,
        "--format",
        "int8",
        "--targets",
        "experts,head,vision",
        "--dtype",
        "bfloat16",
    )
    assert code == 0
    done = {row["kind"] for row in told["coverage"] if not row["why"]}
    assert done == {"experts", "head", "vision"}
    lm = herdling.load(tmp_path / "out")
    assert next(lm.model.parameters()).dtype == torch.bfloat16
    assert sum(isinstance(m, Matrix) for m in lm.model.modules()) == 2 * 2 + 1 + 2 * 6 + 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--format", "int5"], "no format 'int5'"),
        (["--format", "int4", "--shard-bytes", "0"], "shard_bytes is 0; it must be at least 1"),
        (["--format", "nf4"], "no layout for nf4"),
        (["--format", "mxfp4", "--group", "16"], "in groups of 32 alone, not of 16"),
        (["--format", "int4", "--all-experts"], "remedy: --method gptq or awq"),
        (["--format", "int4_g128"], "groups of 128 do not divide its 96 inputs"),
        (["--format", "int8", "--targets", "expert"], "did you mean experts?"),
        (["--format", "int8", "--targets", ","], "targets ',' has an empty name"),
        (["--format", "int8", "--targets", "experts,none"], "target 'none' matches nothing"),
        (
            ["--format", "ternary", "--method", "gptq"],
            "one for each expert; remedy: --method nearest",
        ),
        (["--format", "int4", "--method", "gptq", "--data", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_refusals_leave_nothing(folder, tmp_path, flags, words, capsys):
    code, _ = run(folder, tmp_path, *flags)
    assert code in (1, 2)
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_that_are_no_numbers(folder, tmp_path, capsys):
    model = herdling.load(folder)
    with torch.no_grad():
        model.model.language_model.model.layers[1].feed_forward.experts.down_proj[2, 3, 4] = (
            torch.nan
        )
    herdling.save(model, tmp_path / "broken")
    code = main(["quantize", str(tmp_path / "broken"), str(tmp_path / "out"), "--format", "int4"])
    assert code == 2
    assert (
        "layer 1: quantize: feed_forward.experts.down_proj holds inf or NaN"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_a_folder_that_reads_back_differently_is_not_kept(folder, tmp_path, monkeypatch):
    def forget(self, *args, **kwargs):
        return original(self, *args, **kwargs) + 1e-3

    original = streaming.Layers.embed
    calls = []

    def embed(self, ids):
        calls.append(self)
        return original(self, ids) if len(calls) == 1 else forget(self, ids)

    monkeypatch.setattr(streaming.Layers, "embed", embed)
    source = Folder.open(folder)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="what was written says something else"):
        streaming.quantize_folder(
            source,
            tmp_path / "out",
            scheme("int8"),
            torch.arange(3, 35).view(2, 16),
            shard_bytes=10**9,
        )


def test_quantizing_twice(folder, tmp_path, capsys):
    assert run(folder, tmp_path, "--format", "int8")[0] == 0
    code = main(["quantize", str(tmp_path / "out"), str(tmp_path / "again"), "--format", "int8"])
    assert code == 2
    assert "is quantized already" in capsys.readouterr().err
