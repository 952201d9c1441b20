"""How much one call may ask for; everything beyond is refused before any work is done."""

from collections.abc import Sequence
from dataclasses import dataclass

from herdling.serve.errors import bad_request, too_long
from herdling.serve.protocol import Options


@dataclass(frozen=True)
class Limits:
    """Bounds of a call. The model's context bounds prompts besides."""

    body_bytes: int = 32 * 2**20
    """Largest request body."""
    body_seconds: float = 60.0
    """Longest time in which a body may come in."""
    prompt_tokens: int | None = None
    """Longest prompt; None leaves it to the model's context."""
    max_tokens: int | None = None
    """Most new tokens a reply may be asked for; more is cut down to this. None: the context."""
    default_max_tokens: int = 4096
    """Most new tokens of a chat reply that does not say."""
    choices: int = 128
    """Most replies of a call: prompts times n."""
    stops: int = 16
    """Most stop strings."""
    stop_characters: int = 1000
    """Longest stop string."""
    top_logprobs: int = 20
    """Most alternatives to a token."""
    bias: int = 1024
    """Most entries of logit_bias."""
    tools: int = 128
    """Most tools offered to the model, and most calls in a reply."""
    schema_characters: int = 200_000
    """Longest JSON schema or grammar."""
    images: int = 16
    """Most pictures of a call."""
    image_bytes: int = 20 * 2**20
    """Largest picture, as a file."""
    megapixels: float = 32.0
    """Largest picture, decoded."""
    queue: int = 256
    """Requests that may wait for their first token; calls beyond are answered 429."""
    seconds: float | None = 600.0
    """A reply that takes longer is cut and sent as it is."""


def check_options(options: Options, limits: Limits, prompts: int = 1) -> None:
    """Raise ApiError 400 naming the field that is beyond its limit."""
    _at_most("n", options.n * prompts, limits.choices, "choices in all, prompts times n")
    _at_most("stop", len(options.stop), limits.stops, "stop strings")
    for text in options.stop:
        if not text:
            raise bad_request("stop holds an empty string, which would end every reply", "stop")
        _at_most("stop", len(text), limits.stop_characters, "characters in a stop string")
    _at_most("stop_token_ids", len(options.stop_ids), 1024, "stop tokens")
    _at_most("top_logprobs", options.top_logprobs, limits.top_logprobs, "alternatives")
    _at_most("logprobs", options.prompt_logprobs or 0, limits.top_logprobs, "alternatives")
    _at_most("logit_bias", len(options.logit_bias or ()), limits.bias, "entries")
    if options.max_tokens is not None and options.max_tokens < 0:
        raise bad_request(f"max_tokens is {options.max_tokens}; it must be 0 or more", "max_tokens")


def check_prompt(ids: Sequence[int], context: int, limits: Limits, param: str) -> None:
    """Raise ApiError 400 for a prompt that leaves no room for a reply in `context` tokens."""
    longest = min(context, limits.prompt_tokens or context)
    if len(ids) >= longest + (longest < context):
        raise too_long(len(ids), longest, param)


def _at_most(param: str, given: int, most: int, what: str) -> None:
    if given > most:
        raise bad_request(f"{given} {what} were asked for; at most {most} are allowed", param)
