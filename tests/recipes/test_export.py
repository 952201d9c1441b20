"""export --to hf normalises what it is given; unknown targets say what there is.

Run: python -m pytest tests/recipes/test_export.py
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import gguf
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from herdling import cli, lora
from herdling.checkpoint import Card, open_model, save_model
from herdling.checkpoint.folder import SINGLE
from herdling.inputs.tokenizer import Tokenizer
from herdling.lora import LoraConfig
from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.model.llama import build
from herdling.recipes import export_run as export

TOK = Tokenizer.train(["the quick brown fox jumps over the lazy dog"] * 9, vocab_size=300)
CONFIG = preset("nano", vision=False, vocab_size=len(TOK))


@pytest.fixture
def folder(tmp_path) -> Path:
    card = Card("toy", license="mit").after("pretrain", data=["stdlib"])
    save_model(initialize(build(CONFIG)), CONFIG, tmp_path / "a", TOK, card=card)
    return tmp_path / "a"


def test_hf_fuses_experts_renews_the_config_and_keeps_the_rest(folder, tmp_path, capsys):
    whole = load_file(folder / SINGLE)
    loose = {}
    for name, tensor in whole.items():
        if name.endswith("experts.gate_up_proj"):
            for e, expert in enumerate(tensor):
                gate, up = expert.T.contiguous().chunk(2)
                stem = name.replace("gate_up_proj", str(e))
                loose |= {
                    f"{stem}.gate_proj.weight": gate.clone(),
                    f"{stem}.up_proj.weight": up.clone(),
                }
        elif name.endswith("experts.down_proj"):
            for e, expert in enumerate(tensor):
                loose[name.replace("down_proj", f"{e}.down_proj.weight")] = expert.T.contiguous()
        else:
            loose[name] = tensor
    save_file(loose, folder / SINGLE, {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    raw["rope_theta"] = raw.pop("rope_parameters")["rope_theta"]
    raw |= {"attn_temperature_tuning": 4, "torch_dtype": raw.pop("dtype")}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "generation_config.json").write_text('{"temperature": 0.3, "do_sample": true}')

    assert cli.main(["export", str(folder), str(tmp_path / "b"), "--to", "hf"]) == 0
    assert "read back and equal" in capsys.readouterr().out
    again = load_file(tmp_path / "b" / SINGLE)
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    new = json.loads((tmp_path / "b" / "config.json").read_text())
    assert new["attn_temperature_tuning"] is True
    assert "rope_theta" not in new
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (folder / name).read_bytes()
    card = Card.open(tmp_path / "b", CONFIG)
    assert [step.stage for step in card.steps] == ["pretrain", "export"]
    assert (card.name, card.license) == ("b", "mit")


def test_hf_in_another_type(folder, tmp_path):
    args = ["export", str(folder), str(tmp_path / "b"), "--to", "hf", "--dtype", "bfloat16"]
    assert cli.main(args) == 0
    model, _ = open_model(tmp_path / "b")
    expected = load_file(folder / SINGLE)["lm_head.weight"].bfloat16()
    assert torch.equal(model.lm_head.weight, expected)


def test_unknown_target_names_what_there_is(folder, tmp_path, capsys):
    assert cli.main(["export", str(folder), str(tmp_path / "b"), "--to", "onnx"]) == 2
    message = capsys.readouterr().err
    assert "--to onnx" in message
    assert "hf, meta" in message
    assert (
        cli.main(["export", str(folder), str(tmp_path / "b"), "--to", "hf", "--dtype", "int8"]) == 2
    )
    assert "dtype is 'int8'" in capsys.readouterr().err


def test_what_reads_back_differently_is_not_kept(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "same", lambda a, b: a.dim() == 1)
    for target in ("hf", "meta"):
        assert cli.main(["export", str(folder), str(tmp_path / "b"), "--to", target]) == 1
        assert "reads back differently" in capsys.readouterr().err
        assert sorted(os.listdir(tmp_path)) == ["a"]


def test_model_parallel_size_that_does_not_divide(folder, tmp_path, capsys):
    args = ["export", str(folder), str(tmp_path / "b"), "--to", "meta", "--model-parallel", "3"]
    assert cli.main(args) == 2
    assert "num_key_value_heads is 1" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_same_is_bit_for_bit():
    nan = torch.tensor([float("nan"), 0.0])
    assert export.same(nan, nan.clone())
    assert not export.same(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not export.same(nan, nan.double())


@pytest.mark.parametrize("target", ["hf", "meta"])
def test_other_things_are_not_replaced(folder, tmp_path, target, capsys):
    home = tmp_path / "models"
    (home / "precious").mkdir(parents=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for out, words in (
        (home, "models holds precious, no part of a model"),
        (folder, "is or holds"),
        (tmp_path, "is or holds"),
    ):
        assert cli.main(["export", str(folder), str(out), "--to", target]) == 2
        assert words in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert (home / "precious").is_dir()


def test_an_older_export_is_replaced(folder, tmp_path):
    for target in ("hf", "meta", "meta", "hf"):
        assert cli.main(["export", str(folder), str(tmp_path / "b"), "--to", target]) == 0
    assert (tmp_path / "b" / SINGLE).exists()
    assert not (tmp_path / "b" / "params.json").exists()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_the_target_is_checked_before_anything_is_downloaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    (tmp_path / "notes.txt").touch()
    assert cli.main(["export", "someone/model", str(tmp_path), "--to", "hf"]) == 2
    assert "holds notes.txt" in capsys.readouterr().err


def test_gguf_of_a_model_and_of_its_adapter(folder, tmp_path, capsys):
    out = tmp_path / "b.gguf"
    with pytest.warns(UserWarning, match="up to 15 tokens of context only"):
        assert cli.main(["export", str(folder), str(out), "--to", "gguf", "--type", "q8_0"]) == 0
    assert "read back and equal" in capsys.readouterr().out
    fields = gguf.GGUFReader(out).fields
    assert fields["general.architecture"].contents() == "llama4"
    assert fields["llama4.context_length"].contents() == 15
    model, _ = open_model(folder)
    lora.attach(model, LoraConfig(r=2, targets=("experts",)), "a")
    lora.save(model, tmp_path / "adapter", base=str(folder))
    args = ["export", str(tmp_path / "adapter"), str(tmp_path / "a.gguf"), "--to", "gguf"]
    assert cli.main(args) == 0
    tensors = {t.name for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert "blk.3.ffn_down_exps.weight.lora_b" in tensors
    assert len(tensors) == 4 * 3 * 2


def test_gguf_writes_the_vision_part_beside(tmp_path):
    config = preset("nano", vocab_size=len(TOK))
    ids = {"image_token_index": TOK.patch, "boi_token_index": 0, "eoi_token_index": 1}
    config = replace(config, **ids)
    save_model(initialize(build(config)), config, tmp_path / "v", TOK, card=Card("v"))
    args = ["export", str(tmp_path / "v"), str(tmp_path / "v.gguf"), "--to", "gguf"]
    with pytest.warns(UserWarning, match="tokens of context only"):
        assert cli.main(args) == 0
    assert sorted(os.listdir(tmp_path)) == ["mmproj-v.gguf", "v", "v.gguf"]
    fields = gguf.GGUFReader(tmp_path / "mmproj-v.gguf").fields
    assert fields["clip.projector_type"].contents() == "llama4"


@pytest.mark.parametrize(
    ("to", "setting", "message"),
    [
        ("gguf", ("--dtype", "bfloat16"), "--dtype is for --to hf and meta, not gguf"),
        ("hf", ("--model-parallel", "2"), "--model-parallel is for --to meta, not hf"),
        ("meta", ("--type", "f16"), "--type is for --to gguf, not meta"),
    ],
)
def test_a_setting_of_another_target_is_not_passed_over(
    folder, tmp_path, capsys, to, setting, message
):
    args = ["export", str(folder), str(tmp_path / "b.gguf"), "--to", to, *setting]
    assert cli.main(args) == 2
    assert message in capsys.readouterr().err


def test_gguf_refusals(folder, tmp_path, capsys):
    assert cli.main(["export", str(folder), str(tmp_path / "b"), "--to", "gguf"]) == 2
    assert "b.gguf" in capsys.readouterr().err
    args = ["export", str(folder), str(tmp_path / "b.gguf"), "--to", "gguf", "--type", "q3"]
    with pytest.warns(UserWarning, match="tokens of context only"):
        assert cli.main(args) == 2
    assert "type is 'q3'" in capsys.readouterr().err
    model, _ = open_model(folder)
    lora.attach(model, LoraConfig(r=2, targets=("experts",)), "a")
    lora.save(model, tmp_path / "adapter")
    args = ["export", str(tmp_path / "adapter"), str(tmp_path / "b.gguf"), "--to", "gguf"]
    assert cli.main(args) == 2
    assert "give --base" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["a", "adapter"]
