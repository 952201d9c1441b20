"""What goes into the engine and what comes out: requests, events, completions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from herdling.errors import Error, InputError
from herdling.infer.grammar import Grammar
from herdling.infer.sampler import check_seed
from herdling.infer.sampling import Sampling
from herdling.model.config import ModelConfig

FinishReason = Literal["stop", "length", "cancelled"]
Alternatives = list[tuple[int, float]]
"""Token ids with their natural log-probs, likeliest first."""
MOST_ALTERNATIVES = 100


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt and how to go on from it."""

    ids: Sequence[int]
    """The prompt, begin_of_text and all."""
    tiles: Tensor | None = None
    """(n, 3, S, S) float32: the tiles of the prompt's images, in the order of their patch tokens."""
    max_tokens: int = 256
    """Most new tokens; the model's max_position_embeddings may end the reply earlier. 0 only reads
    the prompt (for `prompt_logprobs`)."""
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = 0
    """The same prompt, settings and seed give the same reply; None draws a fresh seed."""
    stop: tuple[str, ...] = ()
    """The reply ends before the first of these texts."""
    stop_ids: tuple[int, ...] = ()
    """The reply ends with the first of these tokens, which is not part of its text."""
    priority: int = 0
    """Smaller is served first; equals in the order of arrival."""
    adapter: str | None = None
    """Name of a loaded adapter; None for the plain model."""
    grammar: Grammar | None = None
    """What the reply must match."""
    top_logprobs: int = 0
    """Alternatives to report for each new token."""
    prompt_logprobs: int | None = None
    """Report each prompt token's log-prob and this many alternatives; None reports nothing."""
    want_experts: bool = False
    """Report which experts every token went to."""


@dataclass(frozen=True)
class PromptToken:
    """What the model thought of a prompt token before it read it."""

    token: int
    logprob: float
    top: Alternatives


@dataclass(frozen=True)
class Timings:
    """Seconds."""

    queue: float
    """From `add` to the first step that took part of the prompt."""
    prefill: float
    """From there to the first new token."""
    decode: float
    """From the first new token to the last."""


@dataclass(frozen=True)
class Completion:
    """A finished reply."""

    text: str
    """Without the stop token or stop string."""
    ids: list[int]
    """Every sampled token, the stop token and those of a stop string included."""
    finish_reason: FinishReason
    """`stop`: a stop token, a stop string, or a grammar that is complete; `length`: max_tokens or
    the model's longest context; `cancelled`: by `Engine.cancel`."""
    prompt_tokens: int
    logprobs: list[float]
    """Natural log-probs of `ids`, from the raw logits."""
    cached_tokens: int = field(default=0, compare=False)
    """Prompt tokens whose keys and values were there already."""
    top: list[Alternatives] = field(default_factory=list)
    """For each of `ids`, where `top_logprobs` asked for it."""
    prompt: list[PromptToken | None] | None = None
    """For each prompt token, where `prompt_logprobs` asked for it; None for the first."""
    experts: Tensor | None = None
    """(prompt and new tokens that the model read, MoE layers, k) int16, where `want_experts`."""
    timings: Timings | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Event:
    """One sampled token of a request, or its end."""

    index: int
    """What `Engine.add` returned; in `Engine.stream` the place of the request."""
    token: int | None
    """None where a request ends without a new token (cancelled, failed, nothing to sample)."""
    logprob: float
    text: str
    """What is now certain to be part of the reply; empty while a character or stop is unfinished."""
    completion: Completion | None = None
    """The whole reply, with its last event."""
    top: Alternatives = field(default_factory=list)
    error: Error | None = None
    """Why the request failed; the others go on."""
    experts: Tensor | None = None
    """(MoE layers, k) int16: where the reply's token before this one went, if `want_experts`. A token is
    routed only when the model reads it, a step after it was sampled."""


@dataclass(frozen=True)
class Stats:
    """The engine at this moment, and its counts since it began."""

    running: int
    waiting: int
    pages: int
    """Pages of the cache, of `page_bytes` each."""
    pages_used: int
    """Held by requests."""
    pages_cached: int
    """Kept for reuse only, given up when room is needed."""
    page_bytes: int
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that needed no computing."""
    new_tokens: int
    steps: int
    preemptions: int
    finished: int
    drafted: int = 0
    """Tokens proposed by speculation."""
    accepted: int = 0
    expert_load: list[list[int]] = field(default_factory=list)
    """Tokens that each expert took, by MoE layer."""


def check(request: Request, config: ModelConfig) -> None:
    """Raise InputError (or ConfigError for settings) unless the model can take the request."""
    ids, longest = request.ids, config.text.max_position_embeddings
    if not ids:
        raise InputError("the prompt has no tokens; begin it with begin_of_text")
    if len(ids) + bool(request.max_tokens) > longest:
        raise InputError(
            f"the prompt has {len(ids)} tokens; with at least one new token that is more than the "
            f"model's max_position_embeddings, {longest}: shorten it"
        )
    if not 0 <= min(ids) <= max(ids) < config.text.vocab_size:
        bad = min(ids) if min(ids) < 0 else max(ids)
        raise InputError(
            f"token id {bad} is outside the vocabulary, 0..{config.text.vocab_size - 1}"
        )
    if request.max_tokens < 0:
        raise InputError(f"max_tokens is {request.max_tokens}; it must be at least 0")
    if "" in request.stop:
        raise InputError("stop holds an empty string, which would end every reply at once")
    for name in ("top_logprobs", "prompt_logprobs"):
        count = getattr(request, name) or 0
        if not 0 <= count <= MOST_ALTERNATIVES:
            raise InputError(f"{name} is {count}; it must be 0 to {MOST_ALTERNATIVES}")
    request.sampling.check_vocabulary(config.text.vocab_size)
    check_seed(request.seed)
    _check_tiles(request, config)


def _check_tiles(request: Request, config: ModelConfig) -> None:
    tiles, vision = request.tiles, config.vision
    if vision is None:
        if tiles is not None:
            raise InputError(
                "the prompt has images, but the model is text-only; use one with vision"
            )
        return
    patches = sum(id == config.image_token_index for id in request.ids)
    count = 0 if tiles is None else tiles.shape[0]
    side = vision.image_size
    if tiles is not None and tiles.shape[1:] != (vision.num_channels, side, side):
        raise InputError(
            f"tiles have shape {tuple(tiles.shape)}; the model takes (n, {vision.num_channels}, "
            f"{side}, {side})"
        )
    if patches != count * vision.tokens_per_tile:
        raise InputError(
            f"the prompt has {patches} patch tokens for {count} tiles of {vision.tokens_per_tile} "
            "tokens; each tile needs exactly its own"
        )
