"""What all APIs have in common: settings of a reply, a chat to answer, and what comes back.

Each API reads its own JSON into `Options` and `Chat`, hands them to `Service`, and writes the `Delta`s
(or the `Reply`s that these add up to) in its own words. The pydantic models here are for the fields
that several APIs share; unknown fields are ignored, null means not given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from herdling.serve.errors import bad_request

if TYPE_CHECKING:
    from herdling.infer.request import Alternatives, Completion

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
ToolChoice = Literal["none", "auto", "required"]
_SEEDS = 2**63


@dataclass(frozen=True)
class Options:
    """How a reply is made; None leaves it to the server."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    """None draws a fresh one. Choice i of n gets seed + i."""
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the reply, beside the tokenizer's own."""
    ignore_eos: bool = False
    """The tokenizer's own stop tokens do not end the reply."""
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    want_experts: bool = False
    priority: int = 0


@dataclass(frozen=True)
class Format:
    """What the reply must look like."""

    kind: Literal["text", "json", "json_schema", "regex", "lark"] = "text"
    text: str = ""
    """The schema as JSON text, the expression or the grammar."""


PLAIN = Format()


@dataclass(frozen=True)
class Chat:
    """A conversation to answer, in the terms of `herdling.inputs.chat`."""

    messages: Sequence[Mapping[str, Any]]
    """OpenAI-style; pictures are parts of type `image_url` (a URL) or `image` (base64 or a URL)."""
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: ToolChoice | Mapping[str, str] = "auto"
    """A mapping {"name": ...} requires that function."""
    parallel_tool_calls: bool = True
    format: Format = PLAIN
    options: Options = field(default_factory=Options)
    model: str | None = None
    """A name of /v1/models; None is the model itself."""


@dataclass(frozen=True)
class Token:
    """A sampled token."""

    id: int
    text: str
    """Its bytes as text; U+FFFD where they are no character by themselves."""
    logprob: float
    """Natural, of the raw logits."""
    top: "Alternatives"
    previous_experts: list[list[int]] | None = None
    """Where the reply's token before this one went, by MoE layer, if that was asked for."""


@dataclass(frozen=True)
class ToolCall:
    """A call that the model wrote."""

    index: int
    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Delta:
    """What is new in one choice."""

    choice: int
    text: str = ""
    """Certain to be content: no part of a stop string or of a tool call."""
    tokens: list[Token] = field(default_factory=list)
    """Sampled since the last delta of this choice; their text may still be held back."""
    call: ToolCall | None = None
    """A whole call, where one was found."""
    finish: FinishReason | None = None
    """With the last delta of a choice, which has no text."""
    completion: "Completion | None" = None
    """With `finish`: the engine's own account."""


@dataclass(frozen=True)
class Reply:
    """All deltas of a choice together."""

    choice: int
    text: str
    calls: list[ToolCall]
    tokens: list[Token]
    finish: FinishReason
    completion: "Completion"


@dataclass
class Usage:
    """Tokens of a call so far; the prompt of several choices counts once."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def plain(self) -> dict[str, Any]:
        """As OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Body(BaseModel):
    """A JSON body: unknown keys are ignored, numbers must be numbers."""

    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())


class StreamOptions(Body):
    """What a stream carries beside the reply."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Extension(Body):
    """Herdling's own wishes, under the key `herdling`."""

    experts: bool | None = Field(None, description="Tell which experts each token went to.")


class Controls(Body):
    """The settings that OpenAI's chat and completions share, with the usual extra ones."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    n: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    priority: int | None = Field(None, ge=-1000, le=1000)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    herdling: Extension | None = None

    def options(self, **more: Any) -> Options:
        """As `Options`; `more` are the fields that each API spells its own way."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        extension = self.herdling or Extension(experts=None)
        return Options(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            typical_p=self.typical_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=read_bias(self.logit_bias),
            seed=None if self.seed is None else self.seed % _SEEDS,
            n=self.n or 1,
            stop=stop,
            stop_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            want_experts=bool(extension.experts),
            priority=self.priority or 0,
            **more,
        )


def read_bias(given: Mapping[str, float] | None) -> dict[int, float] | None:
    """OpenAI's `logit_bias`, whose keys are token ids as text. Raises ApiError."""
    if not given:
        return None
    found = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise bad_request(
                f"logit_bias has the key {key[:40]!r}; keys are token ids, as text", "logit_bias"
            )
        if not -100 <= value <= 100:
            raise bad_request(
                f"logit_bias of token {key} is {value}; it must be -100 to 100", "logit_bias"
            )
        found[int(key)] = float(value)
    return found
