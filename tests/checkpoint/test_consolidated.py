"""Meta's files against slices cut here by hand, for 1, 2 and 4 files, fused and plain names.

`by_hand` is written from the table of names and cut axes in the specification, not with the code
under test, and with plain indexing throughout.
Run: python -m pytest tests/checkpoint/test_consolidated.py
"""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from herdling.checkpoint import consolidated
from herdling.checkpoint.consolidated import Consolidated
from herdling.errors import CheckpointError, ConfigError
from herdling.model import meta_params
from herdling.model.config import ModelConfig, preset


@pytest.fixture(params=["scout", "maverick", "text"])
def wide(request) -> ModelConfig:
    """Four KV heads, so that four files are possible; every width its own number."""
    changes = dict(interleave_moe_layer_step=2, use_qk_norm=False) if request.param == "maverick" else {}  # fmt: skip
    config = preset("nano", vision=request.param != "text", vocab_size=320, hidden_size=64,
                    initializer_range=0.02,  # params.json does not record it
                    num_attention_heads=8, num_key_value_heads=4, head_dim=8,
                    intermediate_size=72, intermediate_size_mlp=144, num_local_experts=3,
                    **changes)  # fmt: skip
    if config.vision is None:
        return config
    vision = replace(config.vision, num_attention_heads=4)
    return replace(config, vision=vision, image_token_index=319)


def part(tensor: Tensor, axis: int, rank: int, ranks: int) -> Tensor:
    """Slice `rank` of `ranks` along an axis."""
    size = tensor.shape[axis] // ranks
    index = [slice(None)] * tensor.dim()
    index[axis] = slice(rank * size, (rank + 1) * size)
    return tensor[tuple(index)].clone()


def by_hand(
    state: dict[str, Tensor], config: ModelConfig, rank: int, ranks: int, plain: bool
) -> dict[str, Tensor]:
    """One file's tensors under Meta's names."""
    text = config.text
    p = "language_model." if config.vision else ""
    F = text.intermediate_size
    out = {
        "tok_embeddings.weight": part(state[f"{p}model.embed_tokens.weight"], 0, rank, ranks),
        "norm.weight": state[f"{p}model.norm.weight"].clone(),
        "output.weight": part(state[f"{p}lm_head.weight"], 0, rank, ranks),
    }
    for layer in range(text.num_hidden_layers):
        ours, theirs = f"{p}model.layers.{layer}.", f"layers.{layer}."
        q, k, v = (part(state[f"{ours}self_attn.{x}_proj.weight"], 0, rank, ranks) for x in "qkv")
        out[f"{theirs}attention.wo.weight"] = part(state[f"{ours}self_attn.o_proj.weight"], 1, rank, ranks)  # fmt: skip
        before = state[f"{ours}input_layernorm.weight"].clone()
        after = state[f"{ours}post_attention_layernorm.weight"].clone()
        ffn, feed = f"{theirs}feed_forward.", f"{ours}feed_forward."
        if plain:
            out |= {
                f"{theirs}attention.w{x}.weight": w for x, w in zip("qkv", (q, k, v), strict=True)
            }
            out |= {f"{theirs}attention_norm.weight": before, f"{theirs}ffn_norm.weight": after}
        else:
            out[f"{theirs}attention.wqkv.weight"] = torch.cat([q, k, v])
            out[f"{theirs}attention.wqkv.layer_norm_weight"] = before
        if layer not in (text.moe_layers or ()):
            gate = part(state[f"{feed}gate_proj.weight"], 0, rank, ranks)
            up = part(state[f"{feed}up_proj.weight"], 0, rank, ranks)
            down = part(state[f"{feed}down_proj.weight"], 1, rank, ranks)
            if plain:
                out |= {f"{ffn}w1.weight": gate, f"{ffn}w3.weight": up, f"{ffn}w2.weight": down}
            else:
                out[f"{ffn}mlp.layer_norm_weight"] = after
                out |= {f"{ffn}mlp.fc1_weight": torch.cat([gate, up]), f"{ffn}mlp.fc2_weight": down}
            continue
        out[f"{ffn}router_DE"] = state[f"{feed}router.weight"].T.clone()
        both, back = state[f"{feed}experts.gate_up_proj"], state[f"{feed}experts.down_proj"]
        w1 = part(both[:, :, :F], 2, rank, ranks)
        w3 = part(both[:, :, F:], 2, rank, ranks)
        w2 = part(back, 1, rank, ranks)
        shared = [
            part(state[f"{feed}shared_expert.{x}_proj.weight"], axis, rank, ranks)
            for x, axis in (("gate", 0), ("up", 0), ("down", 1))
        ]
        if plain:
            out |= {f"{ffn}experts.w1": w1, f"{ffn}experts.w3": w3, f"{ffn}experts.w2": w2}
            names = [f"{ffn}shared_expert.w{i}.weight" for i in (1, 3, 2)]
        else:
            out[f"{ffn}norm.weight"] = after
            E, D, cut = w1.shape
            out[f"{ffn}experts.moe_w_in_eD_F"] = w1.reshape(E * D, cut)
            out[f"{ffn}experts.moe_w_swiglu_eD_F"] = w3.reshape(E * D, cut)
            out[f"{ffn}experts.moe_w_out_eF_D"] = w2.reshape(E * cut, D)
            names = [f"{ffn}w_in_shared_FD.weight", f"{ffn}w_swiglu_FD.weight",
                     f"{ffn}w_out_shared_DF.weight"]  # fmt: skip
        out |= dict(zip(names, shared, strict=True))
    return out | (tiles_by_hand(state, config, rank, ranks) if config.vision else {})


def tiles_by_hand(state: dict, config: ModelConfig, rank: int, ranks: int) -> dict[str, Tensor]:
    assert config.vision
    v, m = "vision_embeddings.", "vision_model."
    e = f"{v}vision_encoder."
    whole = {f"{e}class_embedding": "class_embedding",
             f"{e}positional_embedding_vlm": "positional_embedding_vlm",
             f"{e}ln_pre.weight": "layernorm_pre.weight", f"{e}ln_pre.bias": "layernorm_pre.bias",
             f"{e}ln_post.weight": "layernorm_post.weight", f"{e}ln_post.bias": "layernorm_post.bias"}  # fmt: skip
    rows = {f"{e}conv1._linear.weight": "patch_embedding.linear.weight",
            f"{v}vision_adapter.mlp.c_fc.weight": "vision_adapter.mlp.fc1.weight"}  # fmt: skip
    columns = {f"{v}vision_adapter.mlp.c_proj.weight": "vision_adapter.mlp.fc2.weight"}
    for i in range(config.vision.num_hidden_layers):
        theirs, ours = f"{e}transformer.resblocks.{i}.", f"model.layers.{i}."
        for kind in ("weight", "bias"):
            rows |= {f"{theirs}attn.w{x}.{kind}": f"{ours}self_attn.{x}_proj.{kind}" for x in "qkv"}
            rows[f"{theirs}mlp.c_fc.{kind}"] = f"{ours}mlp.fc1.{kind}"
            whole[f"{theirs}ln_1.{kind}"] = f"{ours}input_layernorm.{kind}"
            whole[f"{theirs}ln_2.{kind}"] = f"{ours}post_attention_layernorm.{kind}"
        columns[f"{theirs}attn.wo.weight"] = f"{ours}self_attn.o_proj.weight"
        columns[f"{theirs}mlp.c_proj.weight"] = f"{ours}mlp.fc2.weight"
        whole[f"{theirs}attn.wo.bias"] = f"{ours}self_attn.o_proj.bias"
        whole[f"{theirs}mlp.c_proj.bias"] = f"{ours}mlp.fc2.bias"
    projector = state["multi_modal_projector.linear_1.weight"]
    return (
        {a: state[m + b].clone() for a, b in whole.items()}
        | {a: part(state[m + b], 0, rank, ranks) for a, b in rows.items()}
        | {a: part(state[m + b], 1, rank, ranks) for a, b in columns.items()}
        | {"vision_projection.weight": part(projector, 0, rank, ranks)}
    )


def put(folder: Path, files: list[dict], config: ModelConfig, wrap=lambda held: held) -> Path:
    folder.mkdir(exist_ok=True)
    for rank, held in enumerate(files):
        torch.save(wrap(held), folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(meta_params.from_config(config)))
    return folder


def tokens(config: ModelConfig) -> dict:
    return dict(bos_token_id=None, eos_token_id=None, pad_token_id=None,
                image_token_index=config.image_token_index)  # fmt: skip


def opened(folder: Path, config: ModelConfig) -> Consolidated:
    return Consolidated.open(folder, config.text.max_position_embeddings, tokens(config))


def assert_same(source: Consolidated, state: dict[str, Tensor]) -> None:
    assert set(source.shapes) == set(state)
    for name, tensor in state.items():
        assert torch.equal(source.read(name), tensor), name


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_reading_files_cut_by_hand(wide, tmp_path, random_model, ranks, plain):
    state = dict(random_model(wide).state_dict())
    files = [by_hand(state, wide, rank, ranks, plain) for rank in range(ranks)]
    source = opened(put(tmp_path / "m", files, wide), wide)
    assert source.config == wide
    assert_same(source, state)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_written_files_are_those_cut_by_hand(wide, tmp_path, random_model, ranks):
    state = dict(random_model(wide).state_dict())
    consolidated.write(wide, state.__getitem__, tmp_path, ranks)
    for rank in range(ranks):
        expected = by_hand(state, wide, rank, ranks, plain=False)
        written = torch.load(tmp_path / f"consolidated.{rank:02d}.pth", weights_only=True)
        assert written.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(written[name], tensor), name
            assert written[name].is_contiguous()
    assert_same(opened(tmp_path, wide), state)


def test_bf16_stays_bf16(wide, tmp_path, random_model):
    state = {name: t.bfloat16() for name, t in random_model(wide).state_dict().items()}
    consolidated.write(wide, state.__getitem__, tmp_path, 2)
    source = opened(tmp_path, wide)
    assert source.dtype == torch.bfloat16
    assert_same(source, state)
    assert source.read("vision_model.class_embedding" if wide.vision else "lm_head.weight", torch.float32).dtype == torch.float32  # fmt: skip


EXTRAS = {
    "rope.freqs": torch.ones(4),
    "layers.0.attention.wqkv._extra_state": io.BytesIO(b"state"),
    "layers.0.attention.wo._extra_state": torch.ones(1),
    "layers.0.feed_forward.experts.mlp._extra_state": io.BytesIO(b""),
    "layers.0.feed_forward.global_gate_stats_3E": torch.ones(3, 3),
    "layers.0.feed_forward.running_gate_stats_3E": torch.ones(3, 3),
    "layers.0.feed_forward.expert_activation_DE": torch.ones(3),
    "vision_embeddings.vision_adapter.fc.weight": torch.ones(2),
    "freq_cis": torch.ones(2),
}


def test_extras_are_dropped_and_a_model_key_is_opened(wide, tmp_path, random_model):
    state = dict(random_model(wide).state_dict())
    files = [by_hand(state, wide, rank, 2, False) | EXTRAS for rank in range(2)]
    folder = put(tmp_path / "m", files, wide, wrap=lambda held: {"model": held})
    assert_same(opened(folder, wide), state)


@pytest.fixture
def made(tmp_path, random_model):
    """(config, two files' tensors, function that writes them and must be refused with words)."""
    config = preset("nano", vocab_size=320, initializer_range=0.02, num_attention_heads=4, num_key_value_heads=2,
                    hidden_size=64, head_dim=16)  # fmt: skip
    config = replace(config, image_token_index=319)
    state = dict(random_model(config).state_dict())
    files = [by_hand(state, config, rank, 2, False) for rank in range(2)]

    def refused(*words: str, error: type[Exception] = CheckpointError) -> None:
        put(tmp_path / "m", files, config)
        with pytest.raises(error) as caught:
            opened(tmp_path / "m", config)
        assert "\n" not in str(caught.value)
        assert all(word in str(caught.value) for word in words), str(caught.value)

    return config, files, refused


def test_missing_in_all_files(made):
    _, files, refused = made
    for held in files:
        del held["layers.1.feed_forward.router_DE"]
    refused("layers.1.feed_forward.router.weight is missing")


def test_half_of_an_expert_tensor_is_missing(made):
    _, files, refused = made
    for held in files:
        del held["layers.1.feed_forward.experts.moe_w_swiglu_eD_F"]
    refused("layers.1.feed_forward.experts.gate_up_proj is missing")


def test_missing_in_one_file(made):
    _, files, refused = made
    del files[1]["output.weight"]
    refused("consolidated.01.pth", "output.weight")


def test_embedding_missing(made):
    _, files, refused = made
    for held in files:
        del held["tok_embeddings.weight"]
    refused("tok_embeddings.weight is missing")


def test_unexpected_with_nearest(made):
    _, files, refused = made
    for held in files:
        held["layers.1.feed_forward.router_DEE"] = torch.ones(1)
    refused("router_DEE is unexpected", "did you mean layers.1.feed_forward.router_DE?")


def test_both_spellings_at_once(made):
    _, files, refused = made
    for held in files:
        held["layers.0.ffn_norm.weight"] = held["layers.0.feed_forward.norm.weight"].clone()
    refused("layers.0.post_attention_layernorm.weight is twice")


def test_mis_shaped(made):
    _, files, refused = made
    files[1]["layers.2.attention.wo.weight"] = torch.ones(64, 16)
    refused("consolidated.01.pth", "layers.2.attention.wo.weight", "[64, 16]", "[64, 32]")


def test_whole_tensors_that_differ_between_files(made):
    _, files, refused = made
    files[1]["norm.weight"] = files[1]["norm.weight"] + 1
    refused("consolidated.01.pth", "norm.weight should be the same")


def test_quantized_release(made):
    _, files, refused = made
    name = "layers.1.feed_forward.experts.moe_w_in_eD_F"
    files[0][name] = files[0][name].to(torch.float8_e4m3fn)
    refused("consolidated.00.pth", name, "float8_e4m3fn", "bf16 release")


def test_older_position_table(made):
    _, files, refused = made
    for held in files:
        table = held.pop("vision_embeddings.vision_encoder.positional_embedding_vlm")
        held["vision_embeddings.vision_encoder.positional_embedding"] = table
    refused("positional_embedding", "class token first")


def test_a_gap_in_the_files(made, tmp_path):
    config, files, refused = made
    put(tmp_path / "m", [*files, {}, {}], config)
    (tmp_path / "m" / "consolidated.02.pth").unlink()
    refused("consolidated.02.pth is missing")


def test_vocabulary_that_contradicts(made, tmp_path):
    config, files, _ = made
    put(tmp_path / "m", files, config)
    params = meta_params.from_config(config) | {"vocab_size": 300}
    (tmp_path / "m" / "params.json").write_text(json.dumps(params))
    with pytest.raises(CheckpointError, match="vocab_size is 300, the embedding has 320"):
        opened(tmp_path / "m", config)
    (tmp_path / "m" / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    assert opened(tmp_path / "m", config).config == config


class Payload:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_code_in_a_file_is_not_run(made, capsys):
    _, files, refused = made
    files[1]["norm.weight"] = Payload()
    refused("consolidated.01.pth", "cannot be read safely", "Unsupported global")
    assert "never" not in capsys.readouterr().out


def test_truncated_file(made, tmp_path):
    config, files, _ = made
    put(tmp_path / "m", files, config)
    file = tmp_path / "m" / "consolidated.01.pth"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth: cannot be read safely"):
        opened(tmp_path / "m", config)


@pytest.mark.parametrize("value", [3, "text", [torch.ones(1)]])
def test_values_that_are_no_tensors(made, value):
    _, files, refused = made
    files[0]["norm.weight"] = value
    refused("consolidated.00.pth", "norm.weight", "not a tensor")


def test_no_files_and_no_params(tmp_path):
    with pytest.raises(CheckpointError, match=r"params\.json: no such file"):
        Consolidated.open(tmp_path)
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no consolidated"):
        Consolidated.open(tmp_path)


@pytest.mark.parametrize(
    ("ranks", "words"), [(0, "at least 1"), (3, "num_key_value_heads"), (4, "num_key_value_heads")]
)
def test_ranks_that_do_not_divide_are_refused(made, tmp_path, ranks, words):
    config, _, _ = made
    with pytest.raises(ConfigError, match=words):
        consolidated.check_ranks(config, ranks)


def test_an_odd_width_cannot_be_cut(made):
    config, _, _ = made
    odd = replace(config, text=replace(config.text, intermediate_size=95))
    with pytest.raises(ConfigError, match="has length 95"):
        consolidated.check_ranks(odd, 2)
