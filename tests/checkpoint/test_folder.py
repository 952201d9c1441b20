"""Opening: every layout of a sound folder gives the same tensors, every fault is named.

Run: python -m pytest tests/checkpoint/test_folder.py
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from herdling.checkpoint import Card, Folder, open_model, save_model
from herdling.checkpoint.folder import INDEX, SINGLE
from herdling.errors import CheckpointError, ConfigError
from herdling.model import weights
from herdling.model.config import preset

CARD = Card("toy", license="apache-2.0")
CONFIG = preset("nano", vision=False, vocab_size=320)
NORM = "model.norm.weight"
EXPERTS = "model.layers.1.feed_forward.experts"


@pytest.fixture
def folder(tmp_path, random_model) -> Path:
    """A text folder in one file."""
    save_model(random_model(CONFIG), CONFIG, tmp_path / "m", card=CARD)
    return tmp_path / "m"


@pytest.fixture
def sharded(tmp_path, random_model) -> Path:
    """The same in several shards with an index."""
    save_model(random_model(CONFIG), CONFIG, tmp_path / "s", card=CARD, shard_bytes=300_000)
    return tmp_path / "s"


def rewrite(folder: Path, change) -> None:
    """Replace the tensors of a one-file folder by what `change` makes of them."""
    tensors = load_file(folder / SINGLE)
    changed = change(tensors)
    save_file(tensors if changed is None else changed, folder / SINGLE, {"format": "pt"})


def equal(model, other) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


def split_experts(tensors: dict, config) -> dict:
    """Written from the table of the format, not with the code under test: [out, in] per expert."""
    F = config.text.intermediate_size
    out = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            base = name.removesuffix("gate_up_proj")
            for e in range(tensor.shape[0]):
                out[f"{base}{e}.gate_proj.weight"] = tensor[e, :, :F].T.contiguous()
                out[f"{base}{e}.up_proj.weight"] = tensor[e, :, F:].T.contiguous()
        elif name.endswith("experts.down_proj"):
            for e in range(tensor.shape[0]):
                out[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"] = tensor[
                    e
                ].T.contiguous()
        else:
            out[name] = tensor
    return out


def test_save_then_open_is_identity(toy, tmp_path, random_model):
    model = random_model(toy)
    save_model(model, toy, tmp_path / "m", card=CARD)
    again, config = open_model(tmp_path / "m")
    assert config == toy
    assert equal(model, again)
    assert all(p.requires_grad and not p.is_meta for p in again.parameters())


def test_shards_are_the_same_model(folder, sharded):
    assert len(list(sharded.glob("*.safetensors"))) > 3
    index = json.loads((sharded / INDEX).read_text())
    assert set(index["weight_map"]) == set(weights.shapes(CONFIG))
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for t in load_file(folder / SINGLE).values()
    )
    assert equal(open_model(folder)[0], open_model(sharded)[0])


def test_per_expert_folders_open(toy, tmp_path, random_model):
    model = random_model(toy)
    save_model(model, toy, tmp_path / "m", card=CARD)
    rewrite(tmp_path / "m", lambda tensors: split_experts(tensors, toy))
    assert equal(model, open_model(tmp_path / "m")[0])


def test_per_expert_and_fused_may_differ_by_layer(folder, random_model):
    def split_one(tensors):
        split = split_experts({n: t for n, t in tensors.items() if n.startswith(EXPERTS)}, CONFIG)
        return {n: t for n, t in tensors.items() if not n.startswith(EXPERTS)} | split

    rewrite(folder, split_one)
    assert equal(open_model(folder)[0], random_model(CONFIG))


def test_read_gives_one_parameter_from_its_parts(folder):
    whole = Folder.open(folder).read(f"{EXPERTS}.gate_up_proj")
    rewrite(folder, lambda tensors: split_experts(tensors, CONFIG))
    assert torch.equal(Folder.open(folder).read(f"{EXPERTS}.gate_up_proj"), whole)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16])
def test_types(tmp_path, random_model, stored, asked):
    model = random_model(CONFIG)
    save_model(model, CONFIG, tmp_path / "m", card=CARD, dtype=stored)
    again, _ = open_model(tmp_path / "m", dtype=asked)
    expected = model.lm_head.weight.to(stored).to(asked or stored)
    assert again.lm_head.weight.dtype == (asked or stored)
    assert torch.equal(again.lm_head.weight, expected)


def test_type_comes_from_old_key_or_from_the_weights(folder):
    rewrite(folder, lambda tensors: {n: t.half() for n, t in tensors.items()})
    raw = json.loads((folder / "config.json").read_text())
    del raw["dtype"]
    (folder / "config.json").write_text(json.dumps(raw))
    assert Folder.open(folder).dtype == torch.float16
    (folder / "config.json").write_text(json.dumps(raw | {"torch_dtype": "bfloat16"}))
    assert Folder.open(folder).dtype == torch.bfloat16


def refused(folder: Path, *words: str) -> None:
    """Opening raises one line that holds all the words."""
    with pytest.raises(CheckpointError) as caught:
        Folder.open(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_tensor(folder):
    rewrite(folder, lambda tensors: tensors.__delitem__(NORM))
    refused(folder, str(folder), NORM, "missing")


def test_missing_tensors_are_counted(folder):
    rewrite(folder, lambda tensors: {NORM: tensors[NORM]})
    refused(folder, "missing", f"and {len(weights.shapes(CONFIG)) - 2} more")


def test_missing_expert_is_named(folder):
    rewrite(folder, lambda tensors: split_experts(tensors, CONFIG))
    rewrite(folder, lambda tensors: tensors.__delitem__(f"{EXPERTS}.2.up_proj.weight"))
    refused(folder, f"{EXPERTS}.2.up_proj.weight is missing")


def test_unexpected_tensor_with_the_nearest_name(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.wieght": torch.ones(2)}))
    refused(folder, SINGLE, "model.norm.wieght", "unexpected", f"did you mean {NORM}?")


def test_vision_tensors_in_a_text_folder(tmp_path, random_model):
    both = preset("nano", vocab_size=320)
    save_model(random_model(both), both, tmp_path / "m", card=CARD)
    text = preset("nano", vision=False, vocab_size=320)
    (tmp_path / "m" / "config.json").write_text(json.dumps(text.to_hf()))
    refused(tmp_path / "m", "unexpected for this config")


def test_mis_shaped_tensor(folder):
    rewrite(folder, lambda tensors: tensors.update({NORM: torch.ones(95)}))
    refused(folder, SINGLE, NORM, "[95]", "[96]")


def test_transposed_experts_are_mis_shaped(folder):
    name = f"{EXPERTS}.gate_up_proj"
    rewrite(
        folder, lambda tensors: tensors.update({name: tensors[name].transpose(1, 2).contiguous()})
    )
    refused(folder, name, "[4, 192, 96]", "[4, 96, 192]")


def test_fused_and_per_expert_at_once(folder):
    rewrite(folder, lambda tensors: {**split_experts(tensors, CONFIG), **tensors})
    refused(folder, "both fused and per expert", "experts.")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32])
def test_packed_or_quantized_tensors(folder, dtype):
    name = f"{EXPERTS}.down_proj"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(4, 96, 96).to(dtype)}))
    refused(folder, name, "only float weights", "unquantized")


def test_quantization_config(folder):
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "compressed-tensors"}
    (folder / "config.json").write_text(json.dumps(raw))
    refused(folder, "quantization_config")


@pytest.mark.parametrize("share", [0.999, 0.7, 0.3])
def test_truncated_file_names_the_first_tensor_cut(folder, share):
    size = (folder / SINGLE).stat().st_size
    os.truncate(folder / SINGLE, int(size * share))
    refused(folder, SINGLE, "truncated: tensor ", "is cut off", str(size))


@pytest.mark.parametrize("size", [0, 5, 200])
def test_truncated_header(folder, size):
    os.truncate(folder / SINGLE, size)
    refused(folder, SINGLE, "truncated within its header")


def test_broken_header(folder):
    (folder / SINGLE).write_bytes((5).to_bytes(8, "little") + b"nope!" * 100)
    refused(folder, SINGLE)


def test_truncated_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1)
    refused(sharded, shard.name, "truncated: tensor ")


def test_absent_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused(sharded, INDEX, shard.name, "absent")


def test_duplicate_across_shards(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    tensors = load_file(second) | dict([load_file(first).popitem()])
    save_file(tensors, second, {"format": "pt"})
    refused(sharded, second.name, "the index puts it elsewhere")


def test_index_that_promises_more_than_a_shard_holds(sharded):
    table = json.loads((sharded / INDEX).read_text())
    first = next(iter(table["weight_map"]))
    files = sorted(set(table["weight_map"].values()))
    table["weight_map"][first] = next(f for f in files if f != table["weight_map"][first])
    (sharded / INDEX).write_text(json.dumps(table))
    refused(sharded, "the index")


@pytest.mark.parametrize("bad", ["../outside.safetensors", 3, "sub/part.safetensors"])
def test_index_may_not_leave_the_folder(sharded, bad):
    table = json.loads((sharded / INDEX).read_text())
    table["weight_map"][NORM] = bad
    (sharded / INDEX).write_text(json.dumps(table))
    refused(sharded, INDEX, NORM, "not a file name")


@pytest.mark.parametrize("text", ["{}", "[]", '{"weight_map": {}}'])
def test_index_without_a_map(sharded, text):
    (sharded / INDEX).write_text(text)
    refused(sharded, "no weight_map")


def test_both_single_file_and_index(folder, sharded):
    (folder / INDEX).write_bytes((sharded / INDEX).read_bytes())
    refused(folder, "both", "stale")


def test_only_a_pickle(folder):
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "unpickled")


def test_no_weights(folder):
    (folder / SINGLE).unlink()
    refused(folder, "has neither")


def test_no_config(folder):
    (folder / "config.json").unlink()
    refused(folder, "config.json: no such file")


def test_metas_own_format_is_recognised(folder):
    (folder / "config.json").rename(folder / "params.json")
    refused(folder, "herdling import-meta")


@pytest.mark.parametrize("text", ["[]", "{", '"x"'])
def test_broken_config(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json")


def test_config_errors_name_the_file(folder):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"head_dim": 33}))
    with pytest.raises(ConfigError, match=r"config\.json: head_dim is 33"):
        Folder.open(folder)
