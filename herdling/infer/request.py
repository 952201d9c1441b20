"""What goes into the engine and what comes out: requests, events, completions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from herdling.errors import InputError
from herdling.infer.sampler import Sampling, check_seed
from herdling.model.config import ModelConfig

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt and how to go on from it."""

    ids: Sequence[int]
    """The prompt, begin_of_text and all."""
    tiles: Tensor | None = None
    """(n, 3, S, S) float32: the tiles of the prompt's images, in the order of their patch tokens."""
    max_tokens: int = 256
    """Most new tokens; the model's max_position_embeddings may end the reply earlier."""
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = 0
    """The same prompt, settings and seed give the same reply; None draws a fresh seed."""
    stop: tuple[str, ...] = ()
    """The reply ends before the first of these texts."""
    stop_ids: tuple[int, ...] = ()
    """The reply ends with the first of these tokens, which is not part of its text."""


@dataclass(frozen=True)
class Completion:
    """A finished reply."""

    text: str
    """Without the stop token or stop string."""
    ids: list[int]
    """Every sampled token, the stop token and those of a stop string included."""
    finish_reason: FinishReason
    """`stop`: a stop token or stop string; `length`: max_tokens or the model's longest context."""
    prompt_tokens: int
    logprobs: list[float]
    """Natural log-probs of `ids`, from the raw logits."""


@dataclass(frozen=True)
class Event:
    """One sampled token of the request at `index`."""

    index: int
    token: int
    logprob: float
    text: str
    """What is now certain to be part of the reply; empty while a character or stop is unfinished."""
    completion: Completion | None = None
    """The whole reply, with its last event."""


def check(request: Request, config: ModelConfig) -> None:
    """Raise InputError (or ConfigError for settings) unless the model can take the request."""
    ids, longest = request.ids, config.text.max_position_embeddings
    if not ids:
        raise InputError("the prompt has no tokens; begin it with begin_of_text")
    if len(ids) >= longest:
        raise InputError(
            f"the prompt has {len(ids)} tokens; with at least one new token that is more than the "
            f"model's max_position_embeddings, {longest}: shorten it"
        )
    if not 0 <= min(ids) <= max(ids) < config.text.vocab_size:
        bad = min(ids) if min(ids) < 0 else max(ids)
        raise InputError(
            f"token id {bad} is outside the vocabulary, 0..{config.text.vocab_size - 1}"
        )
    if request.max_tokens < 1:
        raise InputError(f"max_tokens is {request.max_tokens}; it must be at least 1")
    if "" in request.stop:
        raise InputError("stop holds an empty string, which would end every reply at once")
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
