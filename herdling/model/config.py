"""The shape of a Llama 4 model, read from and written as transformers' `config.json`.

Field names are transformers' own, so that a config here can be compared with one there line by line.
Not carried: fields that no forward pass reads (router jitter, dropout rates, unused vision fields).
Sources: transformers 5.23 `configuration_llama4.py`; Meta `llama4/args.py`.
"""

import math
import warnings
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args, get_type_hints

from herdling.errors import ConfigError


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3 style frequency scaling: long wavelengths are divided by `factor`."""

    factor: float = 16.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class TextConfig:
    """The decoder. Defaults are Scout's."""

    vocab_size: int = 202048
    hidden_size: int = 5120
    intermediate_size: int = 8192
    """Width of one routed expert and of the shared expert."""
    intermediate_size_mlp: int = 16384
    """Width of the feed-forward of dense (not MoE) layers."""
    num_hidden_layers: int = 48
    num_attention_heads: int = 40
    num_key_value_heads: int = 8
    head_dim: int = 128
    num_local_experts: int = 16
    num_experts_per_tok: int = 1
    interleave_moe_layer_step: int = 1
    moe_layers: tuple[int, ...] | None = None
    """Layers that are MoE; None: layers step-1, 2*step-1, ... of `interleave_moe_layer_step`."""
    no_rope_layer_interval: int = 4
    no_rope_layers: tuple[int, ...] | None = None
    """One 0 or 1 a layer: 1 means the layer DOES use RoPE (and is local). None: from the interval."""
    use_qk_norm: bool = True
    attention_chunk_size: int | None = 8192
    attn_temperature_tuning: bool = True
    floor_scale: int = 8192
    attn_scale: float = 0.1
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = field(default_factory=RopeScaling)
    max_position_embeddings: int = 10485760
    initializer_range: float = 0.02
    bos_token_id: int | None = 200000
    eos_token_id: int | tuple[int, ...] | None = (200001, 200007, 200008)
    pad_token_id: int | None = 200018

    def __post_init__(self) -> None:
        layers = self.num_hidden_layers
        if self.moe_layers is None:
            step = self.interleave_moe_layer_step
            moe = tuple(range(step - 1, layers, step)) if step > 0 else ()
            object.__setattr__(self, "moe_layers", moe)
        if self.no_rope_layers is None:
            every = self.no_rope_layer_interval
            rope = tuple(int((i + 1) % every != 0) if every else 1 for i in range(layers))
            object.__setattr__(self, "no_rope_layers", rope)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", "num_key_value_heads", "head_dim", "floor_scale",
                     "max_position_embeddings"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; RoPE needs an even number")
        if len(self.no_rope_layers or ()) != layers:
            raise ConfigError(
                f"no_rope_layers has {len(self.no_rope_layers or ())} entries for {layers} layers"
            )
        if any(not 0 <= i < layers for i in self.moe_layers or ()):
            raise ConfigError(f"moe_layers {self.moe_layers} names a layer outside 0..{layers - 1}")
        if self.moe_layers and not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ConfigError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; "
                f"it must be 1..{self.num_local_experts} (num_local_experts)"
            )
        if self.attention_chunk_size is not None and self.attention_chunk_size < 1:
            raise ConfigError(
                f"attention_chunk_size is {self.attention_chunk_size}; use null for no chunks"
            )

    def is_moe(self, layer: int) -> bool:
        return layer in (self.moe_layers or ())

    def is_local(self, layer: int) -> bool:
        """Whether the layer uses RoPE and sees only its own chunk; the others are global NoPE."""
        return bool((self.no_rope_layers or ())[layer])


@dataclass(frozen=True)
class VisionConfig:
    """The tile encoder and its adapter. Defaults are Scout's and Maverick's."""

    hidden_size: int = 1408
    intermediate_size: int = 5632
    num_hidden_layers: int = 34
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    num_channels: int = 3
    pixel_shuffle_ratio: float = 0.5
    projector_input_dim: int = 4096
    projector_output_dim: int = 4096
    vision_output_dim: int = 4096
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size",
                     "patch_size", "num_channels", "projector_input_dim"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"vision {name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.pixel_shuffle_ratio <= 1:
            raise ConfigError(
                f"pixel_shuffle_ratio is {self.pixel_shuffle_ratio}; it must be above 0 and at most 1"
            )
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.grid % self.shuffle:
            raise ConfigError(
                f"a tile is {self.grid} patches wide; pixel_shuffle_ratio "
                f"{self.pixel_shuffle_ratio} needs a multiple of {self.shuffle}"
            )
        if self.hidden_size % self.num_attention_heads or self.head_dim % 4:
            raise ConfigError(
                f"hidden_size {self.hidden_size} over num_attention_heads "
                f"{self.num_attention_heads} must give a head width that is a multiple of 4"
            )
        shuffled = self.hidden_size * self.shuffle**2
        if self.intermediate_size != shuffled:
            raise ConfigError(
                f"vision intermediate_size is {self.intermediate_size}; it is also the adapter's "
                f"input width, so it must be hidden_size / pixel_shuffle_ratio^2 = {shuffled}"
            )
        if not self.projector_input_dim == self.projector_output_dim == self.vision_output_dim:
            raise ConfigError(
                "projector_input_dim, projector_output_dim and vision_output_dim must be equal, got "
                f"{self.projector_input_dim}, {self.projector_output_dim}, {self.vision_output_dim}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def shuffle(self) -> int:
        """Patches along one side that pixel shuffle folds into one token."""
        return round(1 / self.pixel_shuffle_ratio)

    @property
    def tokens_per_tile(self) -> int:
        return (self.grid // self.shuffle) ** 2


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: the decoder, and with `vision` the tile encoder that feeds it."""

    text: TextConfig
    vision: VisionConfig | None = None
    image_token_index: int = 200092
    """Id of `<|patch|>`, whose embedding an image feature replaces."""
    boi_token_index: int = 200080
    eoi_token_index: int = 200081

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "ModelConfig":
        """Read a parsed `config.json` of model type llama4 or llama4_text, old or new spelling."""
        kind = raw.get("model_type")
        if kind == "llama4_text":
            return cls(text=_text_from_hf(raw))
        if kind != "llama4":
            raise ConfigError(
                f"model_type is {kind!r}; Herdling opens Llama 4 folders (llama4, llama4_text)"
            )
        if not isinstance(raw.get("text_config"), dict):
            raise ConfigError("config.json of type llama4 has no text_config")
        if not isinstance(raw.get("vision_config"), dict):
            raise ConfigError(
                "config.json of type llama4 has no vision_config; text is llama4_text"
            )
        return cls(
            text=_text_from_hf(raw["text_config"]),
            vision=_vision_from_hf(raw["vision_config"]),
            **{k: v for k, v in _known(cls, raw).items() if k.endswith("_token_index")},
        )

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """The `config.json` that transformers' standard classes open."""
        text = _text_to_hf(self.text)
        if self.vision is None:
            return {"architectures": ["Llama4ForCausalLM"], "dtype": dtype, **text}
        return {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            "dtype": dtype,
            "boi_token_index": self.boi_token_index,
            "eoi_token_index": self.eoi_token_index,
            "image_token_index": self.image_token_index,
            "tie_word_embeddings": False,
            "text_config": {"dtype": dtype, **text},
            "vision_config": {"dtype": dtype, **_vision_to_hf(self.vision)},
        }


def _known(kind: type, raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of `kind` that are given; raises ConfigError for a number that is none."""
    hints = get_type_hints(kind)
    known = {k: v for k, v in raw.items() if k in hints and v is not None}
    for name, value in known.items():
        kinds = set(get_args(hints[name]) or (hints[name],)) - {type(None)}
        if kinds == {int}:
            known[name] = _number(name, value, int)
        elif kinds == {float}:
            known[name] = _number(name, value, float)
    return known


def _number(name: str, value: Any, kind: type[int] | type[float]) -> int | float:
    """`value` as `kind`, which takes 8192.0 for 8192; raises ConfigError for what is no such number."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        if kind is float:
            return float(value)
        if value == int(value):
            return int(value)
    words = "a number" if kind is float else "a whole number"
    raise ConfigError(f"{name} is {value!r}; it must be {words}")


def _numbers(raw: dict[str, Any], name: str) -> tuple[int, ...]:
    if not isinstance(raw[name], list | tuple):
        raise ConfigError(f"{name} is {raw[name]!r}; it must be a list of whole numbers")
    return tuple(int(_number(name, value, int)) for value in raw[name])


def _mapping(raw: dict[str, Any], name: str) -> dict[str, Any]:
    given = raw.get(name) or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{name} is {given!r}; it must be a mapping")
    return given


def _text_from_hf(raw: dict[str, Any]) -> TextConfig:
    for name in ("attention_bias", "tie_word_embeddings"):
        if raw.get(name):
            raise ConfigError(f"{name} is true; Llama 4 has none and Herdling does not build it")
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act is {raw['hidden_act']!r}; Llama 4 uses silu")
    known = _known(TextConfig, raw)
    rope = dict(_mapping(raw, "rope_scaling") or _mapping(raw, "rope_parameters"))
    theta = _mapping(raw, "rope_parameters").get("rope_theta", raw.get("rope_theta"))
    known["rope_theta"] = _number("rope_theta", rope.get("rope_theta", theta) or 500000.0, float)
    known["rope_scaling"] = _scaling_from_hf(rope)
    # Copies of Meta's config give the tuning as the integer 4 (transformers PR 37501).
    known["attn_temperature_tuning"] = bool(raw.get("attn_temperature_tuning", True))
    known["floor_scale"] = known.get("floor_scale") or 8192
    # A missing chunk size means the default; an explicit null means no chunks (Llama Guard 4).
    if "attention_chunk_size" in raw and raw["attention_chunk_size"] is None:
        known["attention_chunk_size"] = None
    known["moe_layers"] = None if raw.get("moe_layers") is None else _numbers(raw, "moe_layers")
    known["no_rope_layers"] = _numbers(raw, "no_rope_layers") if raw.get("no_rope_layers") else None
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(raw.get(name), list) and name == "eos_token_id":
            known[name] = _numbers(raw, name)
        else:
            known[name] = None if raw.get(name) is None else _number(name, raw[name], int)
    # An absent head_dim is transformers' default, 128 as in TextConfig; only null means "divide".
    if "head_dim" in raw and raw["head_dim"] is None:
        known["head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]
    config = TextConfig(**known)
    _check_layer_types(config, raw.get("layer_types"))
    return config


def _check_layer_types(config: TextConfig, given: list[str] | None) -> None:
    """transformers masks by `layer_types` and rotates by `no_rope_layers`; they must agree."""
    if config.attention_chunk_size is None:
        return  # both kinds are the same mask then
    if given is not None and given != _layer_types(config):
        raise ConfigError(
            f"layer_types {given} contradicts no_rope_layers {list(config.no_rope_layers or ())}; "
            "1 there means chunked_attention, 0 full_attention"
        )


def _layer_types(config: TextConfig) -> list[str]:
    kinds = ("full_attention", "chunked_attention")
    return [kinds[config.is_local(i)] for i in range(config.num_hidden_layers)]


def _scaling_from_hf(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ConfigError(f"rope_type is {kind!r}; Llama 4 knows default and llama3")
    scaling = RopeScaling(**_known(RopeScaling, rope))
    if (scaling.factor, scaling.high_freq_factor) == (8.0, 4.0):
        warnings.warn(
            "rope scaling is 8/4, as in copies of base Scout's config; Meta corrected it to 16/1 "
            "(llama-models PR 322). Loaded as written: edit config.json if this is Scout.",
            stacklevel=4,
        )
    return scaling


# transformers' class defaults that are not the releases' values; what a file leaves out has these.
_VISION_ABSENT = {"hidden_size": 768, "image_size": 448, "vision_output_dim": 7680}


def _vision_from_hf(raw: dict[str, Any]) -> VisionConfig:
    raw = dict(raw)
    for name in ("image_size", "patch_size"):
        if isinstance(raw.get(name), list):
            if len(set(_numbers(raw, name))) != 1:
                raise ConfigError(f"vision {name} is {raw[name]}; Herdling's tiles are square")
            raw[name] = raw[name][0]
    known = _VISION_ABSENT | _known(VisionConfig, raw)
    theta = _mapping(raw, "rope_parameters").get("rope_theta", raw.get("rope_theta"))
    known["rope_theta"] = _number("rope_theta", theta or 10000.0, float)
    return VisionConfig(**known)


def _text_to_hf(text: TextConfig) -> dict[str, Any]:
    raw = asdict(text)
    theta, scaling = raw.pop("rope_theta"), raw.pop("rope_scaling")
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    if scaling:
        raw["rope_parameters"] |= {"rope_type": "llama3", **scaling}
    if text.attention_chunk_size is None:
        # transformers cannot build its masks without a chunk size; one this long never cuts.
        raw["attention_chunk_size"] = text.max_position_embeddings
    return {
        "model_type": "llama4_text",
        **{k: list(v) if isinstance(v, tuple) else v for k, v in raw.items()},
        "layer_types": _layer_types(text),
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
    }


def _vision_to_hf(vision: VisionConfig) -> dict[str, Any]:
    raw = asdict(vision)
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": raw.pop("rope_theta")}
    return {"model_type": "llama4_vision_model", "hidden_act": "gelu", **raw}


_TOY_VISION = dict(image_size=32, patch_size=4, hidden_size=96, intermediate_size=384,
                   num_hidden_layers=2, num_attention_heads=4, projector_input_dim=192,
                   projector_output_dim=192, vision_output_dim=192)  # fmt: skip
_TOY_TEXT = dict(rope_scaling=None, attention_chunk_size=128, floor_scale=128,
                 max_position_embeddings=16384, initializer_range=0.05, bos_token_id=None,
                 eos_token_id=None, pad_token_id=None)  # fmt: skip

# One table, one dial. Toy presets shrink chunk, floor_scale, tile and patch in proportion, so that
# local and global layers, temperature tuning and tiling are all exercised at their size.
_PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nano": (
        dict(_TOY_TEXT, vocab_size=1024, hidden_size=96, intermediate_size=96,
             intermediate_size_mlp=192, num_hidden_layers=4, num_attention_heads=3,
             num_key_value_heads=1, head_dim=32, num_local_experts=4,
             attention_chunk_size=32, floor_scale=16),
        dict(_TOY_VISION, hidden_size=48, intermediate_size=192, num_attention_heads=2,
             projector_input_dim=96, projector_output_dim=96, vision_output_dim=96),
    ),
    "tiny": (
        dict(_TOY_TEXT, vocab_size=4096, hidden_size=192, intermediate_size=192,
             intermediate_size_mlp=384, num_hidden_layers=4, num_attention_heads=6,
             num_key_value_heads=2, head_dim=32, num_local_experts=8),
        _TOY_VISION,
    ),
    "small": (
        dict(_TOY_TEXT, vocab_size=32768, hidden_size=512, intermediate_size=512,
             intermediate_size_mlp=1024, num_hidden_layers=8, num_attention_heads=8,
             num_key_value_heads=2, head_dim=64, num_local_experts=12,
             attention_chunk_size=512, floor_scale=512, max_position_embeddings=65536,
             initializer_range=0.04),
        dict(_TOY_VISION, image_size=112, patch_size=14, hidden_size=256, intermediate_size=1024,
             num_hidden_layers=4, projector_input_dim=512, projector_output_dim=512,
             vision_output_dim=512),
    ),
    "base": (
        dict(_TOY_TEXT, vocab_size=32768, hidden_size=2048, intermediate_size=1536,
             intermediate_size_mlp=3072, num_hidden_layers=8, num_attention_heads=16,
             num_key_value_heads=8, head_dim=128, num_local_experts=16,
             attention_chunk_size=2048, floor_scale=2048, max_position_embeddings=262144,
             initializer_range=0.02),
        dict(_TOY_VISION, image_size=224, patch_size=14, hidden_size=512, intermediate_size=2048,
             num_hidden_layers=8, num_attention_heads=8, projector_input_dim=1024,
             projector_output_dim=1024, vision_output_dim=1024),
    ),
    "scout": ({}, {}),
    "maverick": (
        dict(num_local_experts=128, interleave_moe_layer_step=2, use_qk_norm=False,
             rope_scaling=None, max_position_embeddings=1048576),
        {},
    ),
}  # fmt: skip
PRESETS = tuple(_PRESETS)


def preset(name: str, *, vision: bool = True, **overrides: Any) -> ModelConfig:
    """A named size; `overrides` replace single fields of the text config (for example vocab_size)."""
    if name not in _PRESETS:
        raise ConfigError(f"preset {name!r} is unknown; there are {', '.join(PRESETS)}")
    text, tile = _PRESETS[name]
    config = TextConfig(**text)
    # The two derived fields are recomputed, unless given, when what they derive from changes.
    overrides = {"moe_layers": None, "no_rope_layers": None, **overrides}
    return ModelConfig(replace(config, **overrides), VisionConfig(**tile) if vision else None)
