"""What llama.cpp fixes in its Llama 4, and what follows for a config.

Sources: ggml-org/llama.cpp `src/models/llama4.cpp` and `src/llama-graph.cpp` as of ggml 0.25.3. Chunks
are 8192 tokens, attention temperature is 1 + 0.1 log(floor((position + 1) / 8192) + 1), every 4th
layer is global without RoPE, queries and keys are normalised unless there are exactly 128 experts,
the norm of vision layers has one epsilon and their RoPE base 10000.
"""

from herdling.errors import ConfigError
from herdling.model.config import TextConfig, VisionConfig

CHUNK = 8192
FLOOR, SCALE = 8192, 0.1
GLOBAL_EVERY = 4
NO_QK_NORM = 128
REMEDY = "llama.cpp fixes this, so the file would compute something else"


def moe_step(config: TextConfig) -> int:
    """Every which layer is MoE; 0 for none. ConfigError where the layers are not evenly spaced."""
    moe = config.moe_layers or ()
    step = moe[0] + 1 if moe else 0
    if moe != (tuple(range(step - 1, config.num_hidden_layers, step)) if moe else ()):
        raise ConfigError(f"moe_layers is {list(moe)}; GGUF can say every n-th layer only")
    return step


def check_text(config: TextConfig) -> None:
    """Raise ConfigError for a model that llama.cpp computes differently from the first token on."""
    expected = tuple(int((i + 1) % GLOBAL_EVERY != 0) for i in range(config.num_hidden_layers))
    if config.no_rope_layers != expected:
        raise ConfigError(
            f"no_rope_layers is {list(config.no_rope_layers or ())}, not every {GLOBAL_EVERY}th "
            f"layer without RoPE; {REMEDY}"
        )
    if config.use_qk_norm == (config.num_local_experts == NO_QK_NORM):
        raise ConfigError(
            f"use_qk_norm is {config.use_qk_norm} with {config.num_local_experts} experts; "
            f"{REMEDY}: no norm with {NO_QK_NORM} experts, a norm with any other number"
        )
    moe_step(config)


def exact_tokens(config: TextConfig) -> int:
    """How many tokens of context llama.cpp computes as this model does.

    Chunks of another length differ where the shorter kind ends, temperature where either first
    leaves 1: at position floor_scale - 1.
    """
    exact = config.max_position_embeddings
    if config.attention_chunk_size != CHUNK:
        exact = min(exact, config.attention_chunk_size or CHUNK, CHUNK)
    tuned, told = config.attn_temperature_tuning, (config.floor_scale, config.attn_scale)
    if not tuned or told != (FLOOR, SCALE):
        exact = min(exact, FLOOR - 1, config.floor_scale - 1 if tuned else FLOOR)
    return exact


def check_vision(config: VisionConfig) -> None:
    """Raise ConfigError for a vision encoder that llama.cpp computes differently."""
    if config.rope_theta != 10000.0:
        raise ConfigError(f"vision rope_theta is {config.rope_theta}, not 10000; {REMEDY}")
    if config.norm_eps != 1e-5:
        # The norms before and after the layers have 1e-5 here, whatever the layers have.
        raise ConfigError(f"vision norm_eps is {config.norm_eps}, not 1e-5; {REMEDY}")
