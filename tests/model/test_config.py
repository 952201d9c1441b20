"""The config against transformers' classes: every spelling found in the wild, every absent key.

Run: python -m pytest tests/model/test_config.py
"""

import contextlib
import math
from dataclasses import replace

import pytest
from transformers import Llama4Config, Llama4TextConfig

from herdling.errors import ConfigError
from herdling.model import weights
from herdling.model.config import PRESETS, ModelConfig, RopeScaling, TextConfig, preset

TEXT = preset("nano", vision=False).to_hf()
SCALED = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


def text_of(**changes) -> TextConfig:
    """The nano text config read from a config.json with these keys changed."""
    return ModelConfig.from_hf(TEXT | changes).text


def without(raw: dict, *keys: str) -> dict:
    return {key: value for key, value in raw.items() if key not in keys}


@pytest.mark.parametrize("vision", [True, False])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_their_file(name, vision):
    config = preset(name, vision=vision)
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_transformers(name):
    config = preset(name)
    theirs = Llama4Config(**without(config.to_hf(), "model_type", "architectures"))
    assert ModelConfig.from_hf(theirs.to_dict()) == config
    theirs_text = Llama4TextConfig(**preset(name, vision=False).to_hf())
    assert ModelConfig.from_hf(theirs_text.to_dict()).text == config.text


@pytest.mark.parametrize(("name", "count"), [("scout", 108641793536), ("maverick", 401583781376)])
def test_release_parameter_counts(name, count):
    assert sum(math.prod(shape) for shape in weights.shapes(preset(name)).values()) == count


@pytest.mark.parametrize(("name", "count"), [("scout", 1133), ("maverick", 1061)])
def test_release_tensor_counts(name, count):
    assert len(weights.shapes(preset(name))) == count


@pytest.mark.parametrize("key", sorted(set(TEXT) - {"model_type", "architectures", "dtype"}))
def test_an_absent_text_key_means_what_transformers_takes(key):
    raw = without(TEXT, key)
    if key == "num_hidden_layers":  # what counts layers goes with it
        raw = without(raw, "moe_layers", "no_rope_layers", "layer_types")
    if key == "num_key_value_heads":
        raw["num_attention_heads"] = 40
    theirs = ModelConfig.from_hf(Llama4TextConfig(**raw).to_dict()).text
    ours = ModelConfig.from_hf(raw).text
    # Not read by any forward pass; transformers would invent ids 1 and 2 and 131072 positions.
    idle = dict(bos_token_id=None, eos_token_id=None, max_position_embeddings=1)
    assert replace(ours, **idle) == replace(theirs, **idle)


@pytest.mark.parametrize("key", sorted(set(preset("nano").to_hf()["vision_config"]) - {"dtype"}))
def test_an_absent_vision_key_means_what_transformers_takes(key):
    raw = preset("scout").to_hf()
    raw["vision_config"] = without(raw["vision_config"], key)
    theirs = Llama4Config(**without(raw, "model_type", "architectures")).to_dict()
    outcomes = []
    for source in (raw, theirs):
        try:
            outcomes.append(ModelConfig.from_hf(source).vision)
        except ConfigError as error:  # their default width 768 does not fit the adapter's input
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(("given", "meant"), [(4, True), (True, True), (False, False), (0, False)])
def test_tuning_may_be_an_integer(given, meant):
    assert text_of(attn_temperature_tuning=given).attn_temperature_tuning is meant


def test_tuning_absent_is_on():
    assert ModelConfig.from_hf(
        without(TEXT, "attn_temperature_tuning")
    ).text.attn_temperature_tuning


def test_floor_scale_may_be_a_float():
    assert text_of(floor_scale=16.0).floor_scale == 16


def test_old_and_new_rope_spelling_are_the_same():
    old = without(TEXT, "rope_parameters") | {"rope_scaling": SCALED, "rope_theta": 7e4}
    new = TEXT | {"rope_parameters": {**SCALED, "rope_theta": 7e4}}
    first, second = ModelConfig.from_hf(old).text, ModelConfig.from_hf(new).text
    assert first == second
    assert first.rope_scaling == RopeScaling()
    assert first.rope_theta == 7e4


def test_old_spelling_without_scaling():
    old = without(TEXT, "rope_parameters") | {"rope_scaling": None, "rope_theta": 7e4}
    text = ModelConfig.from_hf(old).text
    assert text.rope_scaling is None
    assert text.rope_theta == 7e4


def test_scaling_called_type_and_null_scaling_beside_parameters():
    named = {**without(SCALED, "rope_type"), "type": "llama3"}
    assert text_of(rope_parameters=None, rope_scaling=named).rope_scaling == RopeScaling()
    both = text_of(rope_scaling=None, rope_parameters={**SCALED, "rope_theta": 1e4})
    assert (both.rope_scaling, both.rope_theta) == (RopeScaling(), 1e4)


def test_base_scout_scaling_is_loaded_as_written_with_a_warning():
    wrong = {**SCALED, "factor": 8.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
    with pytest.warns(UserWarning, match="8/4.*16/1"):
        text = text_of(rope_parameters=wrong)
    assert text.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


def test_chunk_size_absent_is_the_default_and_null_is_none():
    assert (
        ModelConfig.from_hf(without(TEXT, "attention_chunk_size")).text.attention_chunk_size == 8192
    )
    assert text_of(attention_chunk_size=None).attention_chunk_size is None


def test_no_chunks_is_written_as_one_chunk_that_never_ends():
    raw = preset("nano", vision=False, attention_chunk_size=None).to_hf()
    assert raw["attention_chunk_size"] == raw["max_position_embeddings"]


def test_keys_of_hub_files_that_no_forward_reads_are_ignored():
    text = text_of(
        for_llm_compressor=False, cache_implementation="hybrid", torch_dtype="bfloat16",
        router_aux_loss_coef=0.001, router_jitter_noise=0.0, output_router_logits=False,
        use_cache=True, attention_dropout=0.0,
    )  # fmt: skip
    assert text == preset("nano").text


@pytest.mark.parametrize("given", [[], None])
def test_rope_layers_empty_or_null_come_from_the_interval(given):
    raw = without(TEXT, "layer_types") | {"no_rope_layers": given}
    assert ModelConfig.from_hf(raw).text.no_rope_layers == (1, 1, 1, 0)


def test_moe_layers_override_the_step_and_empty_means_dense():
    assert text_of(moe_layers=[2], interleave_moe_layer_step=2).moe_layers == (2,)
    assert text_of(moe_layers=None, interleave_moe_layer_step=2).moe_layers == (1, 3)
    assert text_of(moe_layers=[]).moe_layers == ()


def test_head_width_null_is_divided_out_and_absent_is_128():
    assert text_of(head_dim=None).head_dim == 32
    assert ModelConfig.from_hf(without(TEXT, "head_dim")).text.head_dim == 128


def test_square_image_size_as_a_pair():
    raw = preset("nano").to_hf()
    raw["vision_config"]["image_size"] = [32, 32]
    assert ModelConfig.from_hf(raw) == preset("nano")
    raw["vision_config"]["image_size"] = [32, 64]
    with pytest.raises(ConfigError, match=r"image_size is \[32, 64\]"):
        ModelConfig.from_hf(raw)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": "llama4"}, "no text_config"),
        ({"model_type": "llama4", "text_config": TEXT}, "no vision_config"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ({"num_key_value_heads": 2}, "num_attention_heads 3 is not a multiple"),
        ({"head_dim": 33}, "head_dim is 33"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for 4 layers"),
        ({"moe_layers": [4]}, "names a layer outside"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5"),
        ({"attention_chunk_size": 0}, "attention_chunk_size is 0"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"layer_types": ["full_attention"] * 4}, "contradicts no_rope_layers"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_hf(TEXT | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch_size": 5}, "not a multiple of patch_size"),
        ({"intermediate_size": 100}, "intermediate_size is 100"),
        ({"projector_output_dim": 97}, "must be equal"),
        ({"num_attention_heads": 5}, "multiple of 4"),
        ({"pixel_shuffle_ratio": 1 / 3}, "pixel_shuffle_ratio"),
    ],
)
def test_vision_that_cannot_be_built_is_refused(changes, words):
    raw = preset("nano").to_hf()
    raw["vision_config"] |= changes
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_hf(raw)


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ConfigError, match="scout"):
        preset("huge")


def test_preset_overrides_recompute_what_follows():
    config = preset("scout", num_hidden_layers=5, interleave_moe_layer_step=2)
    assert config.text.moe_layers == (1, 3)
    assert config.text.no_rope_layers == (1, 1, 1, 0, 1)


JUNK = ("x", -1, 0, 0.5, float("inf"), True, None, [], [1], ["x"], {}, {"a": 1}, 10**30)


@pytest.mark.filterwarnings("ignore")
def test_whatever_stands_in_a_file_is_read_or_refused_in_words():
    raw = preset("nano", vocab_size=512).to_hf()
    places = [(raw, key) for key in raw]
    for part in ("text_config", "vision_config"):
        places += [(raw[part], key) for key in raw[part]]
        places += [(raw[part]["rope_parameters"], key) for key in raw[part]["rope_parameters"]]
    for holder, key in places:
        kept = holder[key]
        for junk in JUNK:
            holder[key] = junk
            with contextlib.suppress(ConfigError):
                ModelConfig.from_hf(raw)
        holder[key] = kept


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("text_config", "hidden_size", "many", "hidden_size is 'many'; it must be a whole number"),
        ("text_config", "vocab_size", 10.5, "vocab_size is 10.5; it must be a whole number"),
        ("text_config", "rms_norm_eps", "x", "rms_norm_eps is 'x'; it must be a number"),
        ("text_config", "moe_layers", 3, "moe_layers is 3; it must be a list of whole numbers"),
        ("text_config", "rope_parameters", [1], r"rope_parameters is \[1\]; it must be a mapping"),
        ("vision_config", "patch_size", 0, "vision patch_size is 0; it must be at least 1"),
        ("vision_config", "pixel_shuffle_ratio", 0, "pixel_shuffle_ratio is 0.0; it must be above"),
    ],
)
def test_a_wrong_value_is_named(part, name, value, message):
    raw = preset("nano", vocab_size=512).to_hf()
    raw[part][name] = value
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(raw)
