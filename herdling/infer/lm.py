"""A loaded model with everything needed to talk to it.

    lm = herdling.load("runs/demo/model")
    lm.generate(["def add(a, b):"], max_tokens=64)[0].text
    lm.chat([{"role": "user", "content": "Hello"}])["content"]

Prompts of `generate` are text (begin_of_text is put before it), ids taken as they are, or what
`herdling.inputs.chat.render` returns. Images go in through chat messages.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from herdling import lora
from herdling.checkpoint.card import Card
from herdling.checkpoint.open import open_model
from herdling.checkpoint.save import save_model, with_ids
from herdling.checkpoint.source import resolve
from herdling.errors import ConfigError, InputError
from herdling.infer.beams import Beam, search
from herdling.infer.draft_models import ModelDraft
from herdling.infer.drafts import Drafter, FirstDraft, NgramDraft
from herdling.infer.engine import Engine
from herdling.infer.grammar import Grammar
from herdling.infer.request import Completion, Request
from herdling.infer.sampling import Sampling
from herdling.inputs import chat
from herdling.inputs.image_processor import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.llama import LanguageModel
from herdling.quant.schemes import scheme

Prompt = str | Sequence[int] | chat.Rendered
Message = Mapping[str, Any]


class Options(TypedDict, total=False):
    """What a reply may be asked for; see `LM.request` for the defaults."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    min_tokens: int
    seed: int | None
    stop: str | Sequence[str]
    stop_ids: Sequence[int] | None
    grammar: Grammar | None
    priority: int
    adapter: str | None
    top_logprobs: int
    prompt_logprobs: int | None
    want_experts: bool


CHAT_DEFAULTS: Options = {"temperature": 0.6, "top_p": 0.9}
"""Meta's own (llama-models `llama4/generation.py`)."""


SAMPLING = tuple(field.name for field in fields(Sampling))


class LM:
    """Model, tokenizer, config and image processor, with one engine for all of them."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        processor: ImageProcessor | None = None,
        card: Card | None = None,
    ) -> None:
        """`processor` defaults to the one that the vision config implies.

        Raises ConfigError if tokenizer and model do not belong together.
        """
        with_ids(model.config, tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.config = model.config
        if processor is None and self.config.vision is not None:
            processor = ImageProcessor.from_vision_config(self.config.vision)
        self.processor = processor
        """None for a text-only model."""
        self.card = card
        """Where the weights came from; kept by `save`."""
        self.engine = Engine(model, tokenizer)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def request(self, prompt: Prompt, **options: Unpack[Options]) -> Request:
        """An engine request of a prompt and options.

        `stop_ids` None means the tokenizer's; () goes on whatever the model says. What is not given
        has the default of `Request` and `Sampling`.
        """
        tiles = None
        if isinstance(prompt, str):
            ids: Sequence[int] = [self.tokenizer.bos, *self.tokenizer.encode(prompt)]
        elif isinstance(prompt, chat.Rendered):
            ids = prompt.ids
            if prompt.tiles:
                tiles = torch.cat([image.pixel_values for image in prompt.tiles])
        else:
            ids = prompt
        unknown = options.keys() - Options.__annotations__.keys()
        if unknown:
            raise TypeError(f"unknown option {min(unknown)!r}")
        given: dict[str, Any] = dict(options)
        drawing = {k: given.pop(k) for k in SAMPLING if k in given}
        stop = given.pop("stop", ())
        ends = given.pop("stop_ids", None)
        return Request(
            ids,
            tiles,
            sampling=Sampling(**drawing),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_ids=tuple(self.tokenizer.stop_ids if ends is None else ends),
            **given,
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int | None] | None = None,
        **options: Unpack[Options],
    ) -> list[Completion]:
        """Replies to prompts, batched; each is what its prompt alone would give.

        With one `seed` equal prompts get equal replies; `seeds`, one a prompt, tells them apart.
        Raises InputError for a prompt that cannot be taken, with its place in the list.
        """
        if isinstance(prompts, str | chat.Rendered):
            raise InputError("prompts is a single prompt; give a list of prompts")
        if seeds is None:
            seeds = [options.get("seed", 0)] * len(prompts)
        if len(seeds) != len(prompts):
            raise InputError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one each")
        requests = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            own: Options = {**options, "seed": seed}
            requests.append(self.request(prompt, **own))
        return self.engine.run(requests)

    def beams(
        self,
        prompt: Prompt,
        beams: int = 4,
        length_penalty: float = 1.0,
        **options: Unpack[Options],
    ) -> list[Beam]:
        """The best replies that a beam search finds, the best first (see `beams.search`)."""
        return search(self.engine, self.request(prompt, **options), beams, length_penalty)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None = None,
        dialect: str = "pythonic",
    ) -> chat.Rendered:
        """The prompt of a conversation, ready for the reply. Raises InputError."""
        return chat.render(messages, self.tokenizer, tools, True, dialect, None, self.processor)

    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None = None,
        dialect: str = "pythonic",
        **options: Unpack[Options],
    ) -> dict[str, Any]:
        """The assistant's next message: role, content, and tool_calls where `tools` are given.

        Temperature is 0.6 and top_p 0.9 unless said otherwise. A reply that was cut short has
        `"stop_reason": "out_of_tokens"`.
        """
        own: Options = {**CHAT_DEFAULTS, **options}
        request = self.request(self.render(messages, tools, dialect), **own)
        reply = self.engine.run([request])[0]
        message: dict[str, Any] = {"role": "assistant", "content": reply.text, "tool_calls": []}
        if tools:
            ended = bool(reply.ids) and reply.ids[-1] in request.stop_ids
            message = chat.parse(reply.ids if ended else reply.text, self.tokenizer)
        if reply.finish_reason == "length":
            message["stop_reason"] = "out_of_tokens"
        return message

    def stream_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None = None,
        dialect: str = "pythonic",
        **options: Unpack[Options],
    ) -> Generator[str, None, None]:
        """The text of `chat` as it grows; closing the iterator stops the model."""
        own: Options = {**CHAT_DEFAULTS, **options}
        request = self.request(self.render(messages, tools, dialect), **own)
        events = self.engine.stream([request])

        def texts() -> Generator[str, None, None]:
            with closing(events):
                for event in events:
                    if event.text:
                        yield event.text

        return texts()

    @torch.no_grad()
    def logits(
        self, input_ids: Tensor | Sequence[Sequence[int]], pixel_values: Tensor | None = None
    ) -> Tensor:
        """The plain forward: input_ids (B, T) -> (B, T, V) float32, no cache, no padding.

        pixel_values (n, 3, S, S) fill the patch tokens in batch order.
        """
        ids = torch.as_tensor(input_ids, device=self.device)
        if ids.dim() != 2 or ids.shape[1] == 0 or ids.is_floating_point():
            raise InputError(
                f"input_ids has shape {tuple(ids.shape)} and type {ids.dtype}; it must be whole "
                "numbers (batch, length)"
            )
        pixels = None if pixel_values is None else pixel_values.to(self.device)
        return self.model(ids, pixel_values=pixels)


def load(
    path: Path | str,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    adapters: Mapping[str, Path | str] | None = None,
    quantize: str | None = None,
) -> LM:
    """Open a model folder or hub name.

    Args:
        dtype: a floating type such as torch.bfloat16 or "bfloat16"; None keeps the folder's.
        device: None takes the GPU if CUDA has one, else the CPU.
        adapters: name -> adapter folder in peft's format (or hub name); `adapter=name` of `generate`
            and `chat` then asks for one.
        quantize: a format such as "w4a8" (`quant.schemes`), to which weights are rounded as they are
            read; the plain ones are never held. None keeps the folder's.

    Raises CheckpointError for a folder that is not whole, ConfigError for a bad argument.
    """
    how = None if quantize is None else scheme(quantize)
    kind = _dtype(dtype)
    place = _device(device)
    folder = resolve(path)
    tokenizer = Tokenizer.open(folder)  # first, so that a folder without one fails at once
    model, config = open_model(folder, kind, place, how)
    for name, its_folder in (adapters or {}).items():
        lora.load(model, resolve(its_folder), name)
    processor = None if config.vision is None else ImageProcessor.open(folder)
    return LM(model.eval(), tokenizer, processor, Card.open(folder, config))


def load_with(
    adapter: str | None,
    path: Path | str,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> tuple[LM, str | None]:
    """As `load`, with the adapter of a folder if one is given; the name by which to ask for it."""
    return load(path, dtype, device, {adapter: adapter} if adapter else None), adapter or None


def open_draft(draft: str, lm: LM) -> Drafter:
    """Who guesses for a model: `ngram`, or the folder (or hub name) of a smaller model.

    n-grams go first in both cases. Raises ConfigError if the two models do not share their tokens.
    """
    if draft == "ngram":
        return NgramDraft()
    small = load(draft, next(lm.model.parameters()).dtype, lm.device)
    model = ModelDraft(small.model, small.tokenizer, lm.model, lm.tokenizer)
    return FirstDraft(NgramDraft(), model)


def save(lm: LM, folder: Path | str) -> None:
    """Write a complete model folder, atomically; what is known of the weights' origin is kept.

    A model folder already there is replaced; ConfigError if `folder` holds anything else.
    """
    name = Path(folder).resolve().name
    card = (lm.card or Card(name)).after("save", name=name, note="written from Python")
    save_model(lm.model, lm.config, folder, lm.tokenizer, lm.processor, card=card)


def _dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    if given is None:
        return None
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype is {given!r}; use float32, bfloat16 or float16")
    return found


def _device(given: torch.device | str | None) -> torch.device:
    try:
        device = torch.device(given or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        raise ConfigError(f"device is {str(given)!r}, which torch cannot use: {reason}") from None
    return device
