"""Meta's `params.json` beside our config, in both directions.

Meta stores no feed-forward widths; they follow from `dim`, `ffn_exp`, `ffn_dim_multiplier` and
`multiple_of`. Sources: Meta `llama4/args.py` (names, defaults), `llama4/model.py` and `moe.py`
(widths); transformers' conversion script.
"""

import math
from typing import Any

from herdling.errors import CheckpointError, ConfigError
from herdling.model.config import ModelConfig, RopeScaling, TextConfig, VisionConfig

# What Meta's code fixes and params.json cannot say.
_SCALING = RopeScaling(16.0, 1.0, 1.0, 8192)
_RELEASED_WIDTHS = {"ffn_exp": 4.0, "ffn_dim_multiplier": 1.2, "multiple_of": 2048}


def widths(params: dict[str, Any]) -> tuple[int, int]:
    """(dense feed-forward width, expert width) that Meta's code derives from the parameters."""
    moe = params.get("moe_args") or {}
    multiplier = params.get("ffn_dim_multiplier")
    multiple = params.get("multiple_of", 256)

    def width(inner: int, divisor: float = 1.0) -> int:
        inner = int(2 * inner / 3)
        if multiplier is not None:
            inner = int(multiplier * inner)
        return math.ceil(int(inner / divisor) / multiple) * multiple

    # auto_scale_F keeps the active parameters of shared plus routed expert those of a dense layer.
    scaled = moe.get("auto_scale_F", True)
    divisor = moe.get("capacity_factor", 1.0) + 1 if scaled else 1.0
    expansion = params.get("ffn_exp")
    expert = int((4.0 if expansion is None else expansion) * params["dim"])
    return width(4 * params["dim"]), width(expert, divisor)


def to_config(
    params: dict[str, Any],
    vocab_size: int,
    max_positions: int | None = None,
    tokens: dict[str, Any] | None = None,
) -> ModelConfig:
    """The config of a `params.json`.

    Args:
        vocab_size: rows of the embedding; `params` may hold -1.
        max_positions: params.json does not say; by default the instruct releases' figure.
        tokens: ids by our field name (bos_token_id ..., image_token_index ...) when not Llama 4's.
    """
    missing = [key for key in ("dim", "n_layers", "n_heads") if key not in params]
    if missing:
        raise CheckpointError(f"params.json has no {', '.join(missing)}; is it a Llama 4 model's?")
    tokens = dict(tokens or {})
    dense, expert = widths(params)
    moe = params.get("moe_args")
    scaled = bool(params.get("use_scaled_rope", False))
    every = params.get("nope_layer_interval")
    layers = params["n_layers"]
    text: dict[str, Any] = dict(
        vocab_size=vocab_size,
        hidden_size=params["dim"],
        intermediate_size=expert,
        intermediate_size_mlp=dense,
        num_hidden_layers=layers,
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params.get("n_kv_heads") or params["n_heads"],
        head_dim=params["dim"] // params["n_heads"],
        no_rope_layer_interval=every or 0,
        no_rope_layers=None if every else (1,) * layers,
        use_qk_norm=bool(params.get("use_qk_norm", False)),
        attention_chunk_size=params.get("attention_chunk_size"),
        attn_temperature_tuning=bool(params.get("attn_temperature_tuning", False)),
        floor_scale=int(params.get("floor_scale", 8192)),
        attn_scale=params.get("attn_scale", 0.1),
        rms_norm_eps=params.get("norm_eps", 1e-5),
        rope_theta=float(params.get("rope_theta", 500000)),
        rope_scaling=_scaling(params) if scaled else None,
        max_position_embeddings=max_positions or (10485760 if scaled else 1048576),
    )
    if moe is None:  # dense all through, as Llama Guard 4
        text["moe_layers"] = ()
    else:
        text["num_local_experts"] = moe["num_experts"]
        text["num_experts_per_tok"] = moe.get("top_k", 1)
        text["interleave_moe_layer_step"] = moe.get("interleave_moe_layer_step", 1)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name in tokens:
            text[name] = tokens.pop(name)
    vision = params.get("vision_args")
    return ModelConfig(TextConfig(**text), vision and _vision(vision), **tokens)


def _scaling(params: dict[str, Any]) -> RopeScaling:
    factor, high = params.get("rope_scaling_factor"), params.get("rope_high_freq_factor")
    return RopeScaling(
        _SCALING.factor if factor is None else float(factor),
        _SCALING.low_freq_factor,
        _SCALING.high_freq_factor if high is None else float(high),
    )


def _vision(args: dict[str, Any]) -> VisionConfig:
    for name in ("image_size", "patch_size"):
        if args[name]["height"] != args[name]["width"]:
            raise CheckpointError(f"params.json: vision {name} {args[name]} is not square")
    output = args["output_dim"]
    return VisionConfig(
        hidden_size=args["dim"],
        intermediate_size=int(args["dim"] * args["mlp_ratio"]),
        num_hidden_layers=args["n_layers"],
        num_attention_heads=args["n_heads"],
        image_size=args["image_size"]["height"],
        patch_size=args["patch_size"]["height"],
        pixel_shuffle_ratio=args["pixel_shuffle_ratio"],
        projector_input_dim=output,
        projector_output_dim=output,
        vision_output_dim=output,
    )


def from_config(config: ModelConfig) -> dict[str, Any]:
    """The `params.json` of a config; ConfigError where Meta's format cannot hold it."""
    text = config.text
    layers = text.num_hidden_layers
    step, every = text.interleave_moe_layer_step, text.no_rope_layer_interval
    moe, rope = text.moe_layers or (), text.no_rope_layers or ()
    by_interval = tuple(int((i + 1) % every != 0) for i in range(layers)) if every else ()
    local = all(rope)
    _require(
        text.head_dim * text.num_attention_heads == text.hidden_size,
        "head_dim", text.head_dim, "hidden_size / num_attention_heads",
    )  # fmt: skip
    _require(
        not moe or moe == tuple(range(step - 1, layers, step)),
        "moe_layers", moe, f"one layer in {step} (interleave_moe_layer_step)",
    )  # fmt: skip
    _require(
        local or rope == by_interval,
        "no_rope_layers", rope, f"one layer in {every} (no_rope_layer_interval)",
    )  # fmt: skip
    params: dict[str, Any] = {
        "dim": text.hidden_size,
        "n_layers": layers,
        "n_heads": text.num_attention_heads,
        "n_kv_heads": text.num_key_value_heads,
        "vocab_size": text.vocab_size,
        "norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "use_scaled_rope": text.rope_scaling is not None,
        "attention_chunk_size": text.attention_chunk_size,
        "nope_layer_interval": None if local else every,
        "use_qk_norm": text.use_qk_norm,
        "attn_temperature_tuning": text.attn_temperature_tuning,
        "floor_scale": float(text.floor_scale),
        "attn_scale": text.attn_scale,
    }
    if scaling := text.rope_scaling:
        fixed = (scaling.low_freq_factor, scaling.original_max_position_embeddings)
        _require(fixed == (1.0, 8192), "rope_scaling", fixed, "low_freq_factor 1, original 8192")
        params |= {
            "rope_scaling_factor": scaling.factor,
            "rope_high_freq_factor": scaling.high_freq_factor,
        }
    if moe:
        params["moe_args"] = {
            "num_experts": text.num_local_experts,
            "top_k": text.num_experts_per_tok,
            "capacity_factor": 1.0,
            "auto_scale_F": True,
            "interleave_moe_layer_step": step,
        }
    if vision := config.vision:
        _require(vision.rope_theta == 10000.0, "vision rope_theta", vision.rope_theta, "10000")
        _require(vision.num_channels == 3, "num_channels", vision.num_channels, "3")
        _require(vision.norm_eps == 1e-5, "vision norm_eps", vision.norm_eps, "1e-5")
        params["vision_args"] = {
            "image_size": {"height": vision.image_size, "width": vision.image_size},
            "patch_size": {"height": vision.patch_size, "width": vision.patch_size},
            "dim": vision.hidden_size,
            "n_layers": vision.num_hidden_layers,
            "n_heads": vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "output_dim": vision.vision_output_dim,
            "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
        }
    return params | _width_parameters(params, text)


def _require(holds: bool, name: str, value: Any, must: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value}; Meta's params.json can only say {must}")


def _width_parameters(params: dict[str, Any], text: TextConfig) -> dict[str, Any]:
    """Values of the four width fields from which Meta's formula gives this config's widths.

    The released ones where they fit; otherwise the widths' common divisor as `multiple_of`, and a
    multiplier and an expansion that land just below the two widths, so that rounding up hits them.
    """
    wanted = (text.intermediate_size_mlp, text.intermediate_size)
    if widths(params | _RELEASED_WIDTHS) == wanted:
        return dict(_RELEASED_WIDTHS)
    multiple = math.gcd(*wanted)
    # Aim at the middle of (width - multiple, width], clear of every truncation on the way.
    dense, expert = (width - (multiple - 1) // 2 for width in wanted)
    multiplier = (dense + 0.5) / int(8 * text.hidden_size / 3)
    thirds = math.ceil(2 * expert / multiplier)
    fields = {
        "ffn_exp": (math.ceil(1.5 * thirds) + 0.5) / text.hidden_size,
        "ffn_dim_multiplier": multiplier,
        "multiple_of": multiple,
    }
    found = widths(params | fields)
    _require(found == wanted, "intermediate_size_mlp, intermediate_size", wanted, f"{found} nearby")
    return fields
