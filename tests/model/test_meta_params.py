"""params.json: the released widths, Meta's defaults, and configs that survive the round trip.

Run: python -m pytest tests/model/test_meta_params.py
"""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdling.errors import CheckpointError, ConfigError
from herdling.model import meta_params
from herdling.model.config import PRESETS, ModelConfig, RopeScaling, preset

# What the releases' params.json say, put together from the spec's sources.
SCOUT = {
    "dim": 5120, "n_layers": 48, "n_heads": 40, "n_kv_heads": 8, "vocab_size": 202048,
    "ffn_exp": 4.0, "ffn_dim_multiplier": 1.2, "multiple_of": 2048, "norm_eps": 1e-5,
    "rope_theta": 500000.0, "use_scaled_rope": True, "attention_chunk_size": 8192,
    "nope_layer_interval": 4, "use_qk_norm": True, "attn_temperature_tuning": True,
    "moe_args": {"num_experts": 16, "top_k": 1, "capacity_factor": 1.0, "auto_scale_F": True,
                 "interleave_moe_layer_step": 1},
    "vision_args": {"image_size": {"height": 336, "width": 336},
                    "patch_size": {"height": 14, "width": 14}, "dim": 1408, "n_layers": 34,
                    "n_heads": 16, "mlp_ratio": 4.0, "output_dim": 4096,
                    "pixel_shuffle_ratio": 0.5},
}  # fmt: skip
MAVERICK = SCOUT | {
    "use_scaled_rope": False,
    "use_qk_norm": False,
    "moe_args": SCOUT["moe_args"] | {"num_experts": 128, "interleave_moe_layer_step": 2},
}


@pytest.mark.parametrize(("params", "name"), [(SCOUT, "scout"), (MAVERICK, "maverick")])
def test_releases(params, name):
    ours = preset(name)
    ids = {key: getattr(ours.text, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    assert meta_params.to_config(params, 202048, tokens=ids) == ours
    assert meta_params.to_config(params, 202048, tokens={}) == ours  # Llama 4's ids are the default


def test_multiple_of_1024_gives_the_same_widths():
    assert meta_params.widths(SCOUT | {"multiple_of": 1024}) == (16384, 8192)


def test_widths_without_scaling_by_activity():
    params = SCOUT | {"moe_args": SCOUT["moe_args"] | {"auto_scale_F": False}}
    assert meta_params.widths(params) == (16384, 16384)


def test_widths_follow_meta_step_by_step():
    # dim 100: dense int(2 * 400 / 3) = 266, * 1.3 -> 345, up to 350; expert int(2.5 * 100) = 250,
    # int(500 / 3) = 166, * 1.3 -> 215, / (1.5 + 1) -> 86, up to 90.
    params = {"dim": 100, "ffn_exp": 2.5, "ffn_dim_multiplier": 1.3, "multiple_of": 10,
              "moe_args": {"capacity_factor": 1.5}}  # fmt: skip
    assert meta_params.widths(params) == (350, 90)


def test_absent_keys_have_metas_defaults():
    text = meta_params.to_config({"dim": 512, "n_layers": 2, "n_heads": 4}, 1000).text
    assert text.num_key_value_heads == 4
    assert text.attn_temperature_tuning is False
    assert text.use_qk_norm is False
    assert text.attention_chunk_size is None
    assert text.no_rope_layers == (1, 1)
    assert text.moe_layers == ()
    assert text.rope_scaling is None
    assert text.intermediate_size_mlp == 1536  # int(2 * 2048 / 3) = 1365, up to a multiple of 256


def test_scaled_rope_is_16_and_1_unless_said():
    assert meta_params.to_config(SCOUT, 202048).text.rope_scaling == RopeScaling(16, 1, 1, 8192)
    said = SCOUT | {"rope_scaling_factor": 8, "rope_high_freq_factor": 4}
    assert meta_params.to_config(said, 202048).text.rope_scaling == RopeScaling(8, 1, 4, 8192)


def test_longest_context_is_the_instruct_figure_or_what_is_given():
    assert meta_params.to_config(SCOUT, 202048).text.max_position_embeddings == 10485760
    assert meta_params.to_config(MAVERICK, 202048).text.max_position_embeddings == 1048576
    assert meta_params.to_config(SCOUT, 202048, 262144).text.max_position_embeddings == 262144


def round_trip(config: ModelConfig) -> ModelConfig:
    text = config.text
    tokens = {
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "pad_token_id": text.pad_token_id,
        "image_token_index": config.image_token_index,
    }
    params = meta_params.from_config(config)
    return meta_params.to_config(params, text.vocab_size, text.max_position_embeddings, tokens)


@pytest.mark.parametrize("vision", [True, False])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive(name, vision):
    config = preset(name, vision=vision)
    again = round_trip(config)
    # params.json does not say how weights were once drawn.
    std = config.text.initializer_range
    assert replace(again, text=replace(again.text, initializer_range=std)) == config


def test_a_dense_model_and_a_model_without_nope_survive():
    dense = preset("nano", moe_layers=(), no_rope_layers=(1, 1, 1, 1), no_rope_layer_interval=0)
    again = round_trip(dense)
    assert again.text.moe_layers == ()
    assert again.text.no_rope_layers == (1, 1, 1, 1)
    assert (again.text.intermediate_size_mlp, again.text.intermediate_size) == (192, 96)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 64), st.integers(1, 6), st.integers(1, 6), st.integers(1, 32))
def test_any_ordinary_widths_survive(unit, dense, expert, heads):
    config = preset("nano", vision=False, num_attention_heads=heads, num_key_value_heads=heads,
                    hidden_size=32 * heads, intermediate_size=8 * unit * expert,
                    intermediate_size_mlp=8 * unit * dense)  # fmt: skip
    assert meta_params.widths(meta_params.from_config(config)) == (
        8 * unit * dense,
        8 * unit * expert,
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 16}, "head_dim is 16"),
        ({"moe_layers": (0, 3)}, "moe_layers"),
        ({"no_rope_layers": (0, 1, 1, 1)}, "no_rope_layers"),
        ({"rope_scaling": RopeScaling(16, 2, 4, 8192)}, "rope_scaling"),
    ],
)
def test_what_params_json_cannot_say_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        meta_params.from_config(preset("nano", vision=False, **changes))


def test_vision_that_params_json_cannot_say_is_refused():
    config = preset("nano")
    assert config.vision
    odd = replace(config, vision=replace(config.vision, rope_theta=5.0))
    with pytest.raises(ConfigError, match="vision rope_theta is 5"):
        meta_params.from_config(odd)


def test_oblong_tiles_and_a_foreign_file_are_refused():
    vision = SCOUT["vision_args"] | {"image_size": {"height": 336, "width": 448}}
    with pytest.raises(CheckpointError, match="not square"):
        meta_params.to_config(SCOUT | {"vision_args": vision}, 202048)
    with pytest.raises(CheckpointError, match="has no dim, n_layers, n_heads"):
        meta_params.to_config({}, 202048)
