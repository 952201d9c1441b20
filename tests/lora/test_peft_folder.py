"""Adapter folders against peft itself on transformers' Llama 4, in both directions.

python -m pytest tests/lora/test_peft_folder.py
"""

import copy
import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from herdling import lora
from herdling.errors import CheckpointError, ConfigError
from herdling.lora.peft_folder import CONFIG, WEIGHTS

MIXED = dict(interleave_moe_layer_step=2)
SAME_WIDTHS = dict(
    intermediate_size=64
)  # down_proj is (E, 64, 64): shapes do not tell layouts apart


@pytest.fixture
def peft():
    with warnings.catch_warnings():
        # Of its own making: a deprecation in transformers, a hint on heads.
        warnings.simplefilter("ignore")
        import peft

        yield peft


def run(model, ids):
    with torch.no_grad():
        out = model(input_ids=ids)
    return getattr(out, "logits", out)


def stir_peft(model, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


OURS = {
    "everything": (("all", "router"), True, {}, MIXED),
    "text": (("attention", "experts"), False, {}, {}),
    "gate_up alone": (("*.experts.gate_up_proj",), False, {}, {}),
    "down alone": (("*.experts.down_proj", "shared"), False, {}, {}),
    "one layer": (("*.layers.1.*",), True, {}, MIXED),
    "equal widths": (("experts",), False, {}, SAME_WIDTHS),
    "rslora": (("dense", "head", "experts"), False, {"rslora": True}, MIXED),
    "dora": (("attention", "shared", "vision", "projector", "head"), True, {"dora": True}, {}),
}  # fmt: skip


@pytest.mark.parametrize(("targets", "vision", "config", "fields"), OURS.values(), ids=OURS)
def test_peft_opens_ours_with_the_same_logits(make_pair, put_on, image_batch, peft, tmp_path, targets, vision, config, fields):  # fmt: skip
    reference, model = make_pair(vision, **fields)
    ids, pixels = image_batch([[1], [2]] if vision else [[], []], 32)
    inputs = {"pixel_values": pixels} if vision else {}
    with torch.no_grad():
        plain = model(ids, **inputs)
        put_on(model, targets, **config)
        adapted = model(ids, **inputs)
        lora.save(model, tmp_path / "adapter", base="somewhere/base")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "adapter")
        logits = theirs(input_ids=ids, **inputs).logits
    assert (adapted - plain).abs().max() > 0.05
    torch.testing.assert_close(adapted, logits, atol=5e-5, rtol=0)
    again = make_pair(vision, **fields)[1]
    lora.load(again, tmp_path / "adapter", "a")
    with lora.of(again).using(["a"]), torch.no_grad():
        torch.testing.assert_close(again(ids, **inputs), adapted, atol=0, rtol=0)
    assert not any(p.requires_grad for n, p in again.named_parameters() if ".lora." in n)


BOTH = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
THEIRS = {
    "experts and more": (dict(target_modules=["q_proj", "shared_expert.down_proj"], target_parameters=BOTH), {}),
    "all-linear without routers": (dict(target_modules="all-linear", exclude_modules=["router"], target_parameters=BOTH[:1]), MIXED),
    "a regular expression": (dict(target_modules=r".*layers\.[02]\.self_attn\.[qv]_proj", target_parameters=BOTH[1:]), {}),
    "router": (dict(target_modules=[], target_parameters=["router.weight"]), {}),
    "patterns": (dict(target_modules=["q_proj", "k_proj"], target_parameters=BOTH, rank_pattern={r"layers.1.self_attn.q_proj": 5, "experts.down_proj": 2}, alpha_pattern={"k_proj": 9}, use_rslora=True), {}),
    "head": (dict(target_modules=["lm_head", "o_proj"]), {}),
    "dora": (dict(target_modules=["q_proj", "gate_proj"], use_dora=True), MIXED),
    "equal widths": (dict(target_modules=[], target_parameters=BOTH), SAME_WIDTHS),
}  # fmt: skip


@pytest.mark.parametrize(("config", "fields"), THEIRS.values(), ids=THEIRS)
def test_we_open_peft_s_with_the_same_logits(make_pair, peft, ids, tmp_path, config, fields):
    reference, model = make_pair(vision=False, **fields)
    plain = run(model, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(reference), peft.LoraConfig(r=3, lora_alpha=7, **config))  # fmt: skip
        stir_peft(theirs)
        theirs.save_pretrained(tmp_path / "adapter")
    expected = run(theirs.eval(), ids)
    adapters = lora.load(model, tmp_path / "adapter", "theirs")
    with adapters.using(["theirs"]):
        torch.testing.assert_close(run(model, ids), expected, atol=5e-5, rtol=0)
    torch.testing.assert_close(run(model, ids), plain, atol=0, rtol=0)
    assert (expected - plain).abs().max() > 0.05
    # And back: what peft reads of what we write of what it wrote.
    lora.save(model, tmp_path / "ours", "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "ours")
    torch.testing.assert_close(run(back, ids), expected, atol=5e-5, rtol=0)
    lora.merge(model, "theirs")
    torch.testing.assert_close(run(model, ids), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("fields", [{}, SAME_WIDTHS], ids=["by shape", "by version"])
def test_experts_in_the_layout_of_older_pefts(make_pair, put_on, ids, tmp_path, fields):
    """peft 0.17 and 0.18 flattened W (E, i, o) as A (E * r, i), B (o, r * E)."""
    model = make_pair(vision=False, **fields)[1]
    adapters = put_on(model, ("experts",))
    adapted = run(model, ids)
    lora.save(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for site, f in adapters.factors().values():
        inner = ".base_layer" if site.fused == "gate_up_proj" else ""
        stem = f"base_model.model.{site.module}{inner}"
        E, i, r = f.A.shape
        o = f.B.shape[2]
        # delta[e, i, o] = sum_k B.view(o, r, E)[o, k, e] * A.view(E, r, i)[e, k, i] (their einsum)
        tensors[f"{stem}.lora_A.weight"] = f.A.detach().transpose(1, 2).reshape(E * r, i).contiguous()  # fmt: skip
        tensors[f"{stem}.lora_B.weight"] = f.B.detach().permute(2, 1, 0).reshape(o, r * E).contiguous()  # fmt: skip
    save_file(tensors, tmp_path / WEIGHTS)
    raw = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(raw | {"peft_version": "0.18.1"}))
    old = make_pair(vision=False, **fields)[1]
    with lora.load(old, tmp_path, "old").using(["old"]):
        torch.testing.assert_close(run(old, ids), adapted, atol=1e-6, rtol=0)


def test_training_goes_on_from_a_folder(make_model, put_on, ids, tmp_path):
    model = make_model()
    put_on(model)
    adapted = run(model, ids)
    lora.save(model, tmp_path / "a")
    again = make_model()
    lora.load(again, tmp_path / "a", "a", trainable=True)
    torch.testing.assert_close(run(again, ids), adapted, atol=0, rtol=0)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, _ in again.named_parameters() if ".lora." in n
    }


def test_a_number_beyond_the_model_s_type_is_told(make_model, folder):
    change_tensors(folder, lambda t: t.update({Q: t[Q] * 1e6}))
    lora.load(make_model(), folder, "a")
    with pytest.raises(CheckpointError, match=r"q_proj.lora_A.weight holds inf or NaN in torch.float16"):  # fmt: skip
        lora.load(make_model().half(), folder, "a")


def test_a_name_that_is_taken_leaves_the_model_as_it_was(make_model, folder):
    model = make_model()
    lora.load(model, folder, "a")
    for again in (lambda: lora.load(model, folder, "a", trainable=True), lambda: lora.attach(model, lora.LoraConfig(), "a")):  # fmt: skip
        with pytest.raises(ConfigError, match="adapter 'a' is there already"):
            again()
    assert lora.of(model).default is None
    assert all(p.requires_grad == (".lora." not in n) for n, p in model.named_parameters())
    lora.load(model, folder, "b", trainable=True)
    with pytest.raises(ConfigError, match="adapter 'b' is in training; merge or remove it first"):
        lora.load(model, folder, "c", trainable=True)
    assert lora.of(model).names == ["a", "b"]


@pytest.fixture
def folder(make_model, put_on, tmp_path):
    model = make_model()
    put_on(model, ("attention", "experts"))
    lora.save(model, tmp_path / "adapter", base="somewhere/base", files={"README.md": "# A\n"})
    return tmp_path / "adapter"


def test_the_config_names_what_is_meant_and_no_more(folder):
    raw = json.loads((folder / CONFIG).read_text())
    assert raw["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert raw["target_parameters"] == BOTH[::-1]
    assert (raw["r"], raw["lora_alpha"], raw["base_model_name_or_path"]) == (3, 6, "somewhere/base")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
GATE_UP = "base_model.model.model.layers.1.feed_forward.experts.base_layer.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q), f"tensor {Q} is missing"),
        (lambda t: t.pop(GATE_UP), f"tensor {GATE_UP} is missing"),
        (lambda t: t.update({"base_model.model.x.lora_A.weight": torch.zeros(1)}), "x.lora_A.weight is unexpected"),
        (lambda t: t.update({Q: t[Q][:2].clone()}), r"has shape \[2, 96\], the model and .* need \[3, 96\]"),
        (lambda t: t.update({Q: t[Q].to(torch.int8)}), "is stored as I8, not a float"),
        (lambda t: t.update({Q: t[Q] / 0}), "holds inf or NaN"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(320, 96)}), "is a changed weight of the base model"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_errors_and_leave_the_model_plain(make_model, folder, change, message):  # fmt: skip
    change_tensors(folder, change)
    model = make_model()
    with pytest.raises(CheckpointError, match=message) as caught:
        lora.load(model, folder, "a")
    assert "\n" not in str(caught.value)
    assert not any(".lora" in name for name, _ in model.named_modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"bias": "all"}, "bias is 'all'; only none"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], which is not supported"),
        ({"layers_to_transform": [1]}, "layers_to_transform is"),
        ({"some_future_thing": True}, "some_future_thing is True, which is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "peft changes the base model too; remedy"),
        ({"target_modules": ["q_proj", "qkv_proj"]}, "target 'qkv_proj' matches nothing"),
        ({"target_modules": r".*\.wq"}, "matches nothing"),
        ({"use_dora": True}, "use_dora does not go with|magnitude_vector is missing"),
        ({"r": 4}, r"need \[4, "),
        ({"r": None}, "rank_pattern or default for .* is None"),
        ({"r": 3.5}, r"rank_pattern or default for .* is 3\.5; it must be a whole number above 0"),
        ({"lora_alpha": float("nan")}, "alpha_pattern or default for .* is nan; it must be a number above 0"),
        ({"lora_alpha": float("inf")}, "alpha_pattern or default for .* is inf"),
        ({"lora_alpha": 10**400}, "alpha_pattern or default for .* is 1000"),
        ({"alpha_pattern": {"q_proj": "6"}}, "alpha_pattern or default for .* is '6'"),
        ({"rank_pattern": ["q_proj"]}, r"rank_pattern is \['q_proj'\]; it must map patterns"),
        ({"rank_pattern": {"(": 3}}, r"rank_pattern: '\(' is no regular expression"),
        ({"alpha_pattern": "q_proj"}, "alpha_pattern is 'q_proj'; it must map patterns"),
        ({"target_modules": 3}, "target_modules is 3; it must be names or a regular expression"),
        ({"target_modules": [3]}, r"target_modules is \[3\]; it must be names"),
        ({"target_modules": "("}, r"target_modules: '\(' is no regular expression"),
        ({"exclude_modules": 3}, "exclude_modules is 3; it must be names"),
        ({"exclude_modules": "*"}, r"exclude_modules: '\*' is no regular expression"),
        ({"target_parameters": "experts.down_proj"}, "target_parameters is 'experts.down_proj'; it must be names"),
        ({"target_parameters": [*BOTH, "q_proj"]}, "target 'q_proj' matches nothing"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "experts.down_proj"]}, "target 'experts.down_proj' matches nothing"),
        ({"use_rslora": "false"}, "use_rslora is 'false'; it must be true or false"),
        ({"use_dora": 1}, "use_dora is 1; it must be true or false"),
        ({"target_modules": ["q_proj"]}, "is unexpected"),
    ],
)  # fmt: skip
def test_configs_that_ask_for_something_else_are_errors(make_model, folder, change, message):
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(raw | change))
    with pytest.raises(CheckpointError, match=message):
        lora.load(make_model(), folder, "a")


def test_nothing_is_unpickled_and_a_cut_file_is_told(make_model, folder):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=WEIGHTS):
        lora.load(make_model(), folder, "a")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin would have to be unpickled"):
        lora.load(make_model(), folder, "a")
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: no such file$"):
        lora.load(make_model(), folder, "a")


def test_saving_is_atomic_and_replaces_adapters_only(make_model, put_on, folder, monkeypatch, tmp_path):  # fmt: skip
    model = make_model()
    put_on(model, ("head",), seed=9)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("herdling.lora.peft_folder.write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lora.save(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    monkeypatch.undo()
    lora.save(model, folder)
    assert json.loads((folder / CONFIG).read_text())["target_modules"] == ["lm_head"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="is not empty and no adapter folder"):
        lora.save(model, tmp_path / "mine")
    with pytest.raises(ConfigError, match="no adapter 'x'; there are: adapter"):
        lora.save(model, tmp_path / "new", "x")
