"""Few bits through the recipes' real `main`: precision, QLoRA, QAT. See also test_stage_lora.py.

python -m pytest tests/recipes/test_stage_low_bit.py
"""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import herdling
from herdling import lora
from herdling.errors import ConfigError
from herdling.metrics import METRICS, read
from herdling.quant.formats import quantize
from herdling.quant.modules import Matrix
from herdling.quant.schemes import scheme
from herdling.quant.swap import swap
from herdling.recipes import sft


def main(config: sft.Config) -> int:
    """accelerate keeps its first precision for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return sft.main(config)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def base(pretrained) -> Path:
    return pretrained(vision=False)


def tuned(base: Path, out: Path, **fields) -> sft.Config:
    values = dict(data="arithmetic", steps=2, rows=2, length=64)
    return sft.Config(model=str(base), out=out, **{**values, **fields})


@pytest.mark.parametrize("precision", ["fp8", "mxfp4w_mxfp6", "fp16"])
def test_precision_is_one_field(base, tmp_path, precision):
    config = tuned(base, tmp_path / precision, precision=precision, gradient_bits=8)
    assert main(config) == 0
    bf16 = tuned(base, tmp_path / "bf16", precision="bf16")
    main(bf16)
    before = load_file(base / "model.safetensors")
    rounded, plain = (load_file(c.out / "model/model.safetensors") for c in (config, bf16))
    assert rounded.keys() == before.keys()
    name = "model.layers.0.feed_forward.experts.down_proj"
    assert rounded[name].dtype == torch.float32
    assert not torch.equal(rounded[name], before[name])
    assert not torch.equal(rounded[name], plain[name])
    lines = [r for r in read(config.out / METRICS) if "loss" in r]
    assert ("loss_scale" in lines[0]) == (precision == "fp16")


@pytest.mark.parametrize("form", ["int4_g32", "nf4"])
def test_qlora_trains_adapters_on_codes(base, tmp_path, form):
    """OUT/model is the dequantized base plus the adapter, which alone has learnt."""
    config = tuned(base, tmp_path, quantize=form, lora="r=4,alpha=8,targets=attention+experts")
    assert main(config) == 0
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "model"))
    for name in ("norm.weight", "layers.0.feed_forward.router.weight", "embed_tokens.weight"):
        assert torch.equal(before[f"model.{name}"], after[f"model.{name}"])
    shared = "model.layers.0.feed_forward.shared_expert.up_proj.weight"
    assert torch.equal(after[shared], quantize(before[shared], form).dequantize())
    lm = herdling.load(base)
    swap(lm.model, scheme(form))
    lora.load(lm.model, tmp_path / "adapter", "tuned")
    ids = [lm.tokenizer.encode("What is 2 + 3?")]
    with lora.of(lm.model).using(["tuned"]):
        adapted = lm.logits(ids)
    merged = herdling.load(tmp_path / "model").logits(ids)
    torch.testing.assert_close(adapted, merged, atol=5e-5, rtol=0)
    assert not torch.equal(adapted, lm.logits(ids))


def test_qat_leaves_floats_to_go_on_and_codes_to_run(base, tmp_path):
    first = tuned(base, tmp_path / "full", qat="w4a8")
    assert main(first) == 0
    floats = load_file(tmp_path / "full/model/model.safetensors")
    name = "model.layers.1.feed_forward.experts.gate_up_proj"
    assert not torch.equal(floats[name], load_file(base / "model.safetensors")[name])
    second = tuned(tmp_path / "full/model", tmp_path / "adapter", qat="w4a8", lora="r=4,targets=experts")  # fmt: skip
    assert main(second) == 0
    again = load_file(tmp_path / "adapter/model/model.safetensors")
    assert all(torch.equal(floats[n], again[n]) for n in floats)  # frozen, and nothing merged
    third = tuned(tmp_path / "full/model", tmp_path / "both", qat="w4a8", adapter=tmp_path / "adapter/adapter")  # fmt: skip
    assert main(third) == 0
    moved = load_file(tmp_path / "both/model/model.safetensors")
    assert not torch.equal(moved[name], floats[name])
    old, new = (load_file(tmp_path / f / "adapter/adapter_model.safetensors") for f in ("adapter", "both"))  # fmt: skip
    assert any(not torch.equal(old[n], new[n]) for n in old)
    lm = herdling.load(tmp_path / "both/quantized", adapters={"own": tmp_path / "both/adapter"})
    experts = lm.model.get_submodule("model.layers.1.feed_forward.experts")
    assert isinstance(experts.gate_up_proj, Matrix)
    wanted = torch.stack([quantize(w.T, "int4_g32").dequantize().T for w in moved[name]])
    assert torch.equal(torch.stack([experts.gate_up_proj[e] for e in range(4)]), wanted)
    assert lm.generate(["2 + 3"], adapter="own", max_tokens=3)


def test_qat_that_no_folder_could_hold_is_told_before_training(base, tmp_path):
    for name, message in (
        ("nf4", "no layout for nf4"),
        ("int4_g128", "groups of 128 do not divide"),
    ):
        with pytest.raises(ConfigError, match=message):
            main(tuned(base, tmp_path / name, qat=name))
        assert not (tmp_path / name / "model").exists()
        assert not (tmp_path / name / METRICS).exists()


def test_qat_of_codes_is_told(base, tmp_path):
    main(tuned(base, tmp_path / "full", qat="w4a8"))
    with pytest.raises(ConfigError, match="is quantized already; remedy: take the unquantized"):
        main(tuned(tmp_path / "full/quantized", tmp_path / "again", qat="w4a8"))


def test_settings_that_contradict_are_told(base, tmp_path):
    for fields, message in (
        (dict(quantize="nf4"), "--quantize needs --lora"),
        (dict(quantize="nf4", qat="w4a8", lora="r=4"), "exclude each other"),
        (dict(lora="r=4", adapter=base), "leave it out with --adapter"),
        (dict(lora="", adapter=base), "leave it out with --adapter"),
        (dict(lora="", precision="fp8"), "--precision fp8 trains plain weights"),
        (dict(lora="r=4", precision="fp8"), "--precision fp8 trains plain weights"),
        (dict(qat="w5a8"), "no format 'w5a8'"),
    ):
        with pytest.raises(ConfigError, match=message):
            tuned(base, tmp_path, **fields)
