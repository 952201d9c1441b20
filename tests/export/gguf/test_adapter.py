"""What llama.cpp computes from an adapter's file is the adapter's change.

Run: python -m pytest tests/export/gguf/test_adapter.py
"""

import pytest
import torch

from herdling import lora
from herdling.errors import ConfigError
from herdling.export.gguf import writing
from herdling.export.gguf.adapter import adapter
from herdling.lora import LoraConfig

DECODER = ("attention", "shared", "experts", "router", "head", "dense")
ALPHA = "adapter.lora.alpha"


def put_on(model, folder, **config) -> lora.Adapters:
    adapters = lora.attach(model, LoraConfig(**{"r": 3, "alpha": 5.0, **config}), "a", seed=0)
    generator = torch.Generator().manual_seed(0)
    for _, factors in adapters.factors("a").values():
        factors.B.data.copy_(0.1 * torch.randn(factors.B.shape, generator=generator))
    lora.save(model, folder, "a", base="base")
    return adapters


@pytest.mark.parametrize("rslora", [False, True])
def test_changes_are_those_of_every_matrix(make, read, tmp_path, rslora):
    model, folder = make(interleave_moe_layer_step=2)
    factors = put_on(model, tmp_path / "a", targets=DECODER, rslora=rslora).factors("a")
    writing.write(tmp_path / "a.gguf", *adapter(tmp_path / "a", folder))
    file = read(tmp_path / "a.gguf")
    assert file.fields["general.type"] == "adapter"
    assert file.fields["adapter.type"] == "lora"
    seen = set()

    def change(name: str) -> torch.Tensor:
        """alpha / r * B A as llama.cpp has it, r being B's inner width; (..., out, in)."""
        A, B = (file.tensors[f"{name}.lora_{x}"] for x in "ab")
        seen.update({f"{name}.lora_a", f"{name}.lora_b"})
        return file.fields[ALPHA] / B.shape[-1] * B @ A

    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "router": "ffn_gate_inp"}  # fmt: skip
    for path, (site, own) in factors.items():
        wanted, leaf = own.change().detach(), path.rsplit(".", 1)[-1]
        block = f"blk.{path.split('.')[2]}." if ".layers." in path else ""
        if leaf == "gate_up_proj":
            got = [change(f"{block}ffn_{half}_exps.weight") for half in ("gate", "up")]
            torch.testing.assert_close(torch.cat(got, 1).transpose(1, 2), wanted)
        elif site.fused:
            got = change(f"{block}ffn_down_exps.weight")
            torch.testing.assert_close(got.transpose(1, 2), wanted)
        else:
            kind = "_shexp" if "shared_expert" in path else ""
            theirs = parts.get(leaf) or f"ffn_{leaf.removesuffix('_proj')}{kind}"
            name = "output.weight" if leaf == "lm_head" else f"{block}{theirs}.weight"
            torch.testing.assert_close(change(name), wanted)
    assert seen == set(file.tensors)


def test_ranks_and_alphas_of_their_own_go_into_B(make, read, tmp_path):
    model, folder = make()
    put_on(model, tmp_path / "a", targets=("attention",))
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"alpha_pattern": {}', '"alpha_pattern": {"q_proj": 50}'))  # fmt: skip
    assert '"q_proj": 50' in config.read_text()
    writing.write(tmp_path / "a.gguf", *adapter(tmp_path / "a", folder))
    file, own = read(tmp_path / "a.gguf"), lora.of(model).factors("a")
    for path, factor in (("q_proj", 10), ("k_proj", 1)):
        stored = file.tensors[f"blk.1.attn_{path[0]}.weight.lora_b"]
        B = own[f"model.layers.1.self_attn.{path}"][1].B
        torch.testing.assert_close(file.fields[ALPHA] * stored, factor * 5 * B.detach())


def test_what_llama_cpp_cannot_add_is_refused(make, tmp_path):
    model, folder = make(vision=True)
    put_on(model, tmp_path / "v", targets=("vision", "attention"))
    with pytest.raises(ConfigError, match=r"vision_model.*merge it into the model"):
        adapter(tmp_path / "v", folder)
    model, folder = make()
    put_on(model, tmp_path / "d", targets=("attention",), dora=True)
    with pytest.raises(ConfigError, match="is a DoRA adapter"):
        adapter(tmp_path / "d", folder)
    with pytest.raises(ConfigError, match="type is 'q8_0'"):
        adapter(tmp_path / "d", folder, "q8_0")
