"""Every tensor and every field of a decoder's file, read with the gguf library alone.

Run: python -m pytest tests/export/gguf/test_text.py
What llama.cpp makes of such files is asked of llama.cpp itself by `make gguf`.
"""

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from herdling.checkpoint import Card, Folder, save_model
from herdling.errors import CheckpointError, ConfigError
from herdling.export.gguf import text, writing
from herdling.model.config import RopeScaling
from herdling.quant.schemes import scheme
from herdling.quant.swap import swap

DENSE_TOO = dict(interleave_moe_layer_step=2)


def expected(model, layers: int) -> dict[str, torch.Tensor]:
    """What the file must hold, from the modules rather than from a table of names."""
    decoder = getattr(model, "language_model", model)
    out = {
        "token_embd.weight": decoder.model.embed_tokens.weight,
        "output_norm.weight": decoder.model.norm.weight,
        "output.weight": decoder.lm_head.weight,
    }
    for i in range(layers):
        layer, b = decoder.model.layers[i], f"blk.{i}."
        for ours, theirs in zip("qkvo", ("q", "k", "v", "output"), strict=True):
            out[f"{b}attn_{theirs}.weight"] = getattr(layer.self_attn, f"{ours}_proj").weight
        out[f"{b}attn_norm.weight"] = layer.input_layernorm.weight
        out[f"{b}ffn_norm.weight"] = layer.post_attention_layernorm.weight
        ff = layer.feed_forward
        mlp, suffix = (ff.shared_expert, "_shexp") if hasattr(ff, "router") else (ff, "")
        for part in ("gate", "up", "down"):
            out[f"{b}ffn_{part}{suffix}.weight"] = getattr(mlp, f"{part}_proj").weight
        if suffix:
            out[f"{b}ffn_gate_inp.weight"] = ff.router.weight
            gate, up = ff.experts.gate_up_proj.chunk(2, dim=2)
            out[f"{b}ffn_gate_exps.weight"] = torch.stack([e.T for e in gate])
            out[f"{b}ffn_up_exps.weight"] = torch.stack([e.T for e in up])
            out[f"{b}ffn_down_exps.weight"] = torch.stack([e.T for e in ff.experts.down_proj])
    return {name: tensor.detach() for name, tensor in out.items()}


@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("changes", [{}, DENSE_TOO], ids=["moe", "alternating"])
def test_f32_holds_every_tensor_bit_for_bit(make, read, tmp_path, vision, changes):
    model, folder = make(vision=vision, **changes)
    writing.write(tmp_path / "a.gguf", *text.model(folder, "f32"))
    file, wanted = read(tmp_path / "a.gguf"), expected(model, 4)
    assert file.tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(file.tensors[name], tensor), name


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
def test_blocks_are_the_librarys_own(make, read, tmp_path, kind):
    model, folder = make()
    total = writing.write(tmp_path / "a.gguf", *text.model(folder, kind))
    file = read(tmp_path / "a.gguf")
    for name, tensor in expected(model, 4).items():
        wanted = kind
        if tensor.dim() == 1 or "ffn_gate_inp" in name:
            wanted = "f32"
        elif kind == "q4_0" and name in ("token_embd.weight", "output.weight"):
            wanted = "q8_0"
        assert file.kinds[name] == wanted, name
        own = gguf.quants.quantize(
            tensor.contiguous().numpy(), gguf.GGMLQuantizationType[wanted.upper()]
        )
        assert np.array_equal(file.bytes[name].view(np.uint8).ravel(), own.view(np.uint8).ravel())
    assert sum(total.values()) == sum(data.nbytes for data in file.bytes.values())
    # As llama.cpp counts: half a scale of float16 in a block of 32.
    bits = {"f16": 16, "bf16": 16, "q8_0": 8.5, "q4_0": 4.5}[kind]
    weight = folder.read("model.layers.0.self_attn.q_proj.weight")
    assert file.bytes["blk.0.attn_q.weight"].nbytes == weight.numel() * bits / 8


def test_four_bits_that_are_there_already_are_kept(make, read, tok, tmp_path):
    """A folder of int4 codes, as quantization-aware training ends with: the file's grid is its grid."""
    model, _ = make()
    swap(model, scheme("int4"))
    save_model(model, model.config, tmp_path / "coded", tok, card=Card("q"))
    folder = Folder.open(tmp_path / "coded")
    writing.write(tmp_path / "a.gguf", *text.model(folder, "q4_0"))
    file, seen = read(tmp_path / "a.gguf"), 0
    for name, group in folder.plan.groups.items():
        wanted, names = folder.read(name, torch.float32), text.tensor_names(name)
        if group.form.bits == 4 and file.kinds[names[0]] == "q4_0":
            stored = torch.cat([file.tensors[n] for n in names], -2)
            assert torch.equal(stored.mT if wanted.dim() == 3 else stored, wanted), name
            seen += 1
    assert seen == 4 * (4 + 3 + 2)
    # Without knowing of the codes the library's rule would move them.
    moved = gguf.quants.dequantize(
        writing.encode(wanted.mT, "q4_0"), gguf.GGMLQuantizationType.Q4_0
    )
    assert not np.array_equal(moved, wanted.mT.numpy())


def test_rows_that_are_no_whole_blocks_stay_in_f16(make, read, tmp_path):
    _, folder = make(head_dim=24)  # o_proj is 72 wide then
    writing.write(tmp_path / "a.gguf", *text.model(folder, "q8_0"))
    assert read(tmp_path / "a.gguf").kinds["blk.0.attn_output.weight"] == "f16"


def test_fields_say_the_config(make, read, tmp_path):
    _, folder = make(attention_chunk_size=8192, floor_scale=8192, **DENSE_TOO)
    writing.write(tmp_path / "a.gguf", *text.model(folder, "bf16"))
    fields, config = read(tmp_path / "a.gguf").fields, folder.config.text
    wanted = {
        "general.architecture": "llama4",
        "general.type": "model",
        "general.name": "toy",
        "general.license": "mit",
        "general.file_type": 32,
        "llama4.block_count": config.num_hidden_layers,
        "llama4.context_length": config.max_position_embeddings,
        "llama4.embedding_length": config.hidden_size,
        "llama4.feed_forward_length": config.intermediate_size_mlp,
        "llama4.expert_feed_forward_length": config.intermediate_size,
        "llama4.attention.head_count": config.num_attention_heads,
        "llama4.attention.head_count_kv": config.num_key_value_heads,
        "llama4.attention.key_length": config.head_dim,
        "llama4.attention.value_length": config.head_dim,
        "llama4.rope.dimension_count": config.head_dim,
        "llama4.rope.freq_base": 500000.0,
        "llama4.expert_count": config.num_local_experts,
        "llama4.expert_used_count": config.num_experts_per_tok,
        "llama4.interleave_moe_layer_step": 2,
        "llama4.vocab_size": config.vocab_size,
    }
    assert {key: fields[key] for key in wanted} == wanted
    eps = fields["llama4.attention.layer_norm_rms_epsilon"]
    assert eps == pytest.approx(config.rms_norm_eps, rel=1e-6)


def test_rope_factors_divide_the_frequencies(make, read, tmp_path):
    scaling = RopeScaling(16.0, 1.0, 1.0, 64)
    _, folder = make(rope_scaling=scaling, head_dim=64)
    writing.write(tmp_path / "a.gguf", *text.model(folder, "f32"))
    factors = read(tmp_path / "a.gguf").tensors["rope_freqs.weight"]
    pair = torch.arange(32, dtype=torch.float64)
    wavelength = 2 * torch.pi * 500000 ** (pair / 32)
    assert torch.equal(factors, torch.where(wavelength > 64, 16.0, 1.0))
    assert len(set(factors.tolist())) == 2


def test_a_llama_says_so(make, read, tmp_path):
    card = Card("mine").after("import-meta", llama="weights")
    _, folder = make(card=card)
    writing.write(tmp_path / "a.gguf", *text.model(folder, "f32"))
    fields = read(tmp_path / "a.gguf").fields
    assert fields["general.name"] == "Llama-mine"
    assert fields["general.license.name"] == "llama4"
    assert "Built with Llama" in fields["general.description"]


def test_numbers_that_do_not_fit_are_refused_and_nothing_is_kept(make, tmp_path):
    _, folder = make()
    fields, entries = text.model(folder, "f16")
    big = [replace(e, read=lambda e=e: torch.full(e.shape, 1e5)) if "attn_q" in e.name else e for e in entries]  # fmt: skip
    with pytest.raises(CheckpointError, match=r"blk.0.attn_q.weight holds 1e\+05, beyond f16"):
        writing.write(tmp_path / "a.gguf", fields, big)
    nan = [replace(e, read=lambda e=e: torch.full(e.shape, torch.nan)) if "attn_k" in e.name else e for e in entries]  # fmt: skip
    with pytest.raises(CheckpointError, match=r"attn_k\.weight holds NaN"):
        writing.write(tmp_path / "a.gguf", fields, nan)
    assert list(tmp_path.iterdir()) == []


def test_what_reads_back_differently_is_refused(make, tmp_path):
    _, folder = make()
    fields, entries = text.model(folder, "f32")
    calls = iter(range(99))
    bad = [replace(e, read=lambda e=e: torch.full(e.shape, float(next(calls)))) if "blk.2.attn_q" in e.name else e for e in entries]  # fmt: skip
    with pytest.raises(CheckpointError, match=r"blk.2.attn_q.weight reads back differently"):
        writing.write(tmp_path / "a.gguf", fields, bad)
    assert list(tmp_path.iterdir()) == []


def test_unknown_type(make):
    _, folder = make()
    with pytest.raises(ConfigError, match="type is 'q9'; there are f32"):
        text.model(folder, "q9")
