"""What llama.cpp fixes is refused, or told in tokens.

Run: python -m pytest tests/export/gguf/test_limits.py
"""

from dataclasses import replace

import pytest
import torch

from herdling.errors import ConfigError
from herdling.export.gguf import limits
from herdling.model.config import TextConfig, VisionConfig, preset
from herdling.model.init import initialize
from herdling.model.llama import build

SCOUT, MAVERICK = preset("scout").text, preset("maverick").text
THEIRS = dict(attention_chunk_size=8192, floor_scale=8192)


def toy(**changes) -> TextConfig:
    return preset("nano", vision=False, **changes).text


@pytest.mark.parametrize("config", [SCOUT, MAVERICK], ids=["scout", "maverick"])
def test_the_releases_are_exact_at_any_length(config):
    limits.check_text(config)
    assert limits.exact_tokens(config) == config.max_position_embeddings


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        (dict(attention_chunk_size=32, floor_scale=8192), 32),
        (dict(attention_chunk_size=8192, floor_scale=16), 15),
        (dict(attention_chunk_size=None, floor_scale=8192), 8192),
        (dict(attention_chunk_size=32, floor_scale=16), 15),
        (dict(THEIRS, attn_scale=0.2), 8191),
        (dict(THEIRS, attn_temperature_tuning=False), 8191),
        (THEIRS, 16384),
    ],
)
def test_other_constants_are_exact_for_a_while(changes, tokens):
    assert limits.exact_tokens(toy(**changes)) == tokens


def test_the_model_itself_agrees_that_far_and_no_further():
    """Our own decoder with llama.cpp's constants against the toy's."""
    own = toy(vocab_size=40)
    theirs = replace(own, **THEIRS)
    torch.manual_seed(0)
    config = preset("nano", vision=False, vocab_size=40)
    model = initialize(build(config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    other = build(replace(config, text=theirs))
    other.load_state_dict(model.state_dict())
    ids = torch.randint(0, 40, (1, 40))
    with torch.no_grad():
        gap = (model(ids) - other(ids)).abs().amax(-1)[0]
    exact = limits.exact_tokens(own)
    assert float(gap[:exact].max()) < 1e-5  # sums in another order: logits of about 1, in float32
    assert float(gap[exact]) > 1e-3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(use_qk_norm=False), "use_qk_norm is False with 4 experts"),
        (dict(num_local_experts=128), "use_qk_norm is True with 128 experts"),
        (dict(no_rope_layer_interval=2), "no_rope_layers is .*, not every 4th layer"),
        (dict(moe_layers=(0, 3)), r"moe_layers is \[0, 3\]"),
    ],
)
def test_what_would_be_wrong_from_the_start_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        limits.check_text(toy(**changes))


@pytest.mark.parametrize(("moe", "step"), [((), 0), ((0, 1, 2, 3), 1), ((1, 3), 2), ((3,), 4)])
def test_moe_steps(moe, step):
    assert limits.moe_step(toy(moe_layers=moe)) == step


def test_vision_constants():
    limits.check_vision(VisionConfig())
    with pytest.raises(ConfigError, match="rope_theta is 5"):
        limits.check_vision(VisionConfig(rope_theta=5.0))
    with pytest.raises(ConfigError, match="norm_eps is 1e-06"):
        limits.check_vision(VisionConfig(norm_eps=1e-6))
