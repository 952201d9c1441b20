"""What the APIs stand on: the model, the engine's thread, and the settings of the server.

service = Service(Settings(name="demo"))          # loading: calls are answered 503
service.ready(herdling.load("runs/demo/model"))
async with await service.chat(Chat(messages)) as replies: ...
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from herdling.serve import errors, images
from herdling.serve.cleanup import at_end
from herdling.serve.limits import Limits, check_options, check_prompt
from herdling.serve.metrics import Metrics
from herdling.serve.protocol import PLAIN, Chat, Format, Options
from herdling.serve.replies import Replies
from herdling.serve.worker import Engine, Worker

if TYPE_CHECKING:
    from herdling.guard.judges import Judge
    from herdling.guard.policy import Policy
    from herdling.infer.grammar import Grammar
    from herdling.infer.lm import LM
    from herdling.infer.request import Request
    from herdling.inputs.chat import Rendered
    from herdling.serve.guarding import Guarding

# Meta's own for chat (`herdling.infer.lm.CHAT_DEFAULTS`, which would bring torch along).
CHAT_DEFAULTS = Options(temperature=0.6, top_p=0.9)
COMPLETION_DEFAULTS = Options(temperature=1.0, top_p=1.0, max_tokens=16)


@dataclass(frozen=True)
class Settings:
    """What the server was started with."""

    name: str = "herdling"
    """The model's name in the APIs."""
    aliases: tuple[str, ...] = ()
    """Further names that mean the model itself."""
    adapters: tuple[str, ...] = ()
    """Names of loaded adapters; each can be asked for as a model."""
    keys: tuple[str, ...] = ()
    """API keys; none lets everybody in."""
    dialect: str = "pythonic"
    """How tools are described to the model: pythonic or json."""
    limits: Limits = field(default_factory=Limits)
    pictures: images.Policy = field(default_factory=images.Policy)
    trusted: tuple[str, ...] = ()
    """Names under which browsers may reach this server (the Host header); none allows any."""
    origins: tuple[str, ...] = ()
    """Web origins that may call from a browser (CORS)."""
    policy: "Policy | None" = None
    """What safeguards do with what they object to; None: `Policy()`."""
    created: int = field(default_factory=lambda: int(time.time()))


class Service:
    """Model, worker and settings; `lm` is None while the model loads."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.limits = self.settings.limits
        self.metrics = Metrics(self)
        self.lm: LM | None = None
        self.worker: Worker | None = None
        self.guarding: Guarding | None = None
        """Judges what comes in and goes out; None lets everything pass."""
        self.failure: str | None = None
        """Why this server cannot answer any more."""
        self.draining = False
        """The server is going down; calls are answered 503."""
        self.open_paths: set[str] = set()
        """GET paths that need no key: the files of the page."""
        self.on_failure: Callable[[str], None] = lambda reason: None
        """Told from another thread when the engine stops."""
        # Two at a time: decoding takes up to 16 bytes a pixel.
        self._pictures = ThreadPoolExecutor(2, thread_name_prefix="pictures")

    # ---- life

    def ready(self, lm: "LM", engine: Engine | None = None, judge: "Judge | None" = None) -> None:
        """Begin to answer with a loaded model; `engine` defaults to the model's own."""
        if judge is not None:
            from herdling.guard.policy import Policy
            from herdling.serve.guarding import Guarding

            policy = self.settings.policy or Policy()
            self.guarding = Guarding(judge, policy, self.metrics, self._failed)
        self.worker = Worker(engine or lm.engine, self.limits.queue, self._failed)
        self.lm = lm

    def _failed(self, reason: str) -> None:
        self.failure = reason
        self.on_failure(reason)

    def close(self) -> None:
        """End the engine's thread."""
        if self.worker is not None:
            self.worker.stop()
        if self.guarding is not None:
            self.guarding.close()
        self._pictures.shutdown(wait=False, cancel_futures=True)

    def state(self) -> tuple[str, str | None]:
        """`ok`, `loading`, `stopping` or `failed`, and the reason of a failure."""
        if self.failure is not None:
            return "failed", self.failure
        if self.draining:
            return "stopping", None
        return ("loading" if self.lm is None else "ok"), None

    @property
    def busy(self) -> bool:
        """Whether an engine's thread still runs, the model's or a safeguard's."""
        guarding = self.guarding is not None and self.guarding.busy
        return guarding or (self.worker is not None and self.worker.alive)

    def need(self) -> "tuple[LM, Worker]":
        """Model and worker. Raises ApiError 503 while loading, going down, or broken."""
        if self.failure is not None:
            raise errors.unavailable(f"The server has failed: {self.failure}", "engine_failed")
        if self.draining:
            raise errors.unavailable("The server is shutting down", "shutting_down")
        if self.lm is None or self.worker is None:
            raise errors.loading()
        return self.lm, self.worker

    # ---- names

    @property
    def names(self) -> list[str]:
        """Every model that can be asked for: the model, its aliases, its adapters."""
        return [self.settings.name, *self.settings.aliases, *self.settings.adapters]

    def adapter(self, model: str | None) -> str | None:
        """The adapter that a model name stands for; None for the model itself. ApiError 404."""
        if model is None or model in (self.settings.name, *self.settings.aliases):
            return None
        if model in self.settings.adapters:
            return model
        raise errors.no_model(model)

    # ---- replies

    async def chat(self, chat: Chat, defaults: Options = CHAT_DEFAULTS) -> Replies:
        """The replies to a conversation, under way. Raises ApiError or Error."""
        self.need()
        adapter = self.adapter(chat.model)
        check_options(chat.options, self.limits)
        tools = _offered(chat, self.limits)
        conversation = await self._to_judge(chat.messages)
        prompt = await self.render(chat.messages, tools)
        check_prompt(prompt.ids, self.context, self.limits, "messages")
        grammar = await asyncio.to_thread(self._grammar, chat, tools)
        options = _filled(chat.options, defaults)
        if options.max_tokens is None:
            options = replace(options, max_tokens=self.limits.default_max_tokens)
        requests = self.requests(prompt, options, adapter, grammar)
        calls = self.limits.tools if chat.parallel_tool_calls else 1
        return await self.submit(
            requests, calls=bool(tools), most_calls=calls, n=options.n, conversations=[conversation]
        )

    async def complete(
        self,
        prompts: "Sequence[Sequence[int] | Rendered]",
        options: Options,
        model: str | None = None,
        format: Format = PLAIN,
        defaults: Options = COMPLETION_DEFAULTS,
        conversations: "Sequence[Sequence[Mapping[str, Any]]] | None" = None,
    ) -> Replies:
        """The continuations of token ids, n of each prompt side by side. Raises ApiError or Error.

        `conversations` is what safeguards judge in the place of the prompts' text.
        """
        self.need()
        adapter = self.adapter(model)
        check_options(options, self.limits, len(prompts))
        options = _filled(options, defaults)
        grammar = await asyncio.to_thread(self._format, format)
        requests = []
        for prompt in prompts:
            check_prompt(
                _ids(prompt), self.context + (options.max_tokens == 0), self.limits, "prompt"
            )
            requests += self.requests(prompt, options, adapter, grammar)
        if conversations is None and self.guarding is not None:
            conversations = await asyncio.to_thread(self._as_said, prompts)
        judged = [await self._to_judge(messages) for messages in conversations or ()]
        return await self.submit(requests, n=options.n, conversations=judged)

    def _as_said(self, prompts: "Sequence[Sequence[int] | Rendered]") -> list[list[dict[str, Any]]]:
        """The text of each prompt as something that a user said."""
        decode = self.need()[0].tokenizer.decode
        texts = [decode(_ids(prompt), surrogates=False) for prompt in prompts]
        return [[{"role": "user", "content": text}] for text in texts]

    async def _to_judge(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """A conversation as safeguards read it: with its pictures opened, if they look at any."""
        if self.guarding is None or not self.guarding.sees or images.count(messages) == 0:
            return messages
        policy, limits = self.settings.pictures, self.limits
        opened = asyncio.get_running_loop().run_in_executor
        return await opened(self._pictures, images.opened, messages, policy, limits)

    async def submit(
        self,
        requests: "Sequence[Request]",
        *,
        calls: bool = False,
        most_calls: int = 128,
        n: int = 1,
        conversations: Sequence[Sequence[Mapping[str, Any]]] = (),
    ) -> Replies:
        """Put requests into the engine, all or none. Raises ApiError or Error.

        `conversations`, one for n requests each, are judged first where there are safeguards.
        """
        lm, worker = self.need()
        watching, refused = None, False
        if self.guarding is not None:
            for messages in conversations:
                refused = await self.guarding.incoming(messages) or refused
            watching = self.guarding.outgoing([m for m in conversations for _ in range(n)])
        if refused and self.guarding is not None:
            tickets, watching = self.guarding.refusal(requests), None
        else:
            tickets = await worker.submit(requests, self.limits.seconds)
        at_end(tickets.close)
        return Replies(
            tickets,
            lm.tokenizer,
            calls=calls,
            most_calls=most_calls,
            n=n,
            ended=self.metrics.ended,
            watching=watching,
            refused=refused,
        )

    async def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> "Rendered":
        """The prompt of a conversation, its pictures fetched within the policy and cut to tiles."""
        lm, _ = self.need()
        policy, limits, dialect = self.settings.pictures, self.limits, self.settings.dialect
        if images.count(messages) == 0:
            return await asyncio.to_thread(lm.render, messages, list(tools) or None, dialect)

        def work() -> "Rendered":
            shown = images.opened(messages, policy, limits)
            return lm.render(shown, list(tools) or None, dialect)

        if lm.processor is None:
            raise errors.bad_request("this model is text-only; it cannot take pictures", "messages")
        return await asyncio.get_running_loop().run_in_executor(self._pictures, work)

    def requests(
        self,
        prompt: "Sequence[int] | Rendered",
        options: Options,
        adapter: str | None = None,
        grammar: "Grammar | None" = None,
    ) -> "list[Request]":
        """Engine requests for the n choices of one prompt."""
        import torch

        from herdling.infer.request import Request

        lm, _ = self.need()
        pictures = getattr(prompt, "tiles", None)
        tiles = torch.cat([t.pixel_values for t in pictures]) if pictures else None
        own = () if options.ignore_eos else tuple(lm.tokenizer.stop_ids)
        room = self.limits.max_tokens or self.context
        request = Request(
            _ids(prompt),
            tiles,
            max_tokens=min(
                room, self.context if options.max_tokens is None else options.max_tokens
            ),
            sampling=_sampling(options),
            stop=options.stop,
            stop_ids=tuple(dict.fromkeys([*own, *options.stop_ids])),
            priority=options.priority,
            adapter=adapter,
            grammar=grammar,
            top_logprobs=options.top_logprobs,
            prompt_logprobs=options.prompt_logprobs,
            want_experts=options.want_experts,
        )
        seeds = [
            None if options.seed is None else (options.seed + i) % 2**63 for i in range(options.n)
        ]
        return [replace(request, seed=seed) for seed in seeds]

    @property
    def context(self) -> int:
        """The longest that a prompt and its reply can be together."""
        lm, _ = self.need()
        return lm.config.text.max_position_embeddings

    # ---- grammars

    def _grammar(self, chat: Chat, tools: Sequence[Mapping[str, Any]]) -> "Grammar | None":
        """What the reply must match, for tools that must be called or for a format."""
        choice = chat.tool_choice
        if tools and (choice == "required" or isinstance(choice, Mapping)):
            from herdling.infer.tool_grammar import tool_grammar

            several = choice == "required" and chat.parallel_tool_calls
            return tool_grammar(tools, "required", self.settings.dialect, several)
        return self._format(chat.format)

    def _format(self, format: Format) -> "Grammar | None":
        if format.kind == "text":
            return None
        from herdling.infer.grammar import Grammar

        if len(format.text) > self.limits.schema_characters:
            raise errors.bad_request(
                f"the schema has {len(format.text)} characters; at most "
                f"{self.limits.schema_characters} are allowed",
                "response_format",
            )
        return Grammar(format.kind, format.text)


def _ids(prompt: "Sequence[int] | Rendered") -> Sequence[int]:
    return prompt.ids if hasattr(prompt, "ids") else prompt  # pyright: ignore


def _filled(options: Options, defaults: Options) -> Options:
    """`options` with the defaults of temperature, top_p and max_tokens where they are not given."""
    names = ("temperature", "top_p", "max_tokens")
    missing = {n: getattr(defaults, n) for n in names if getattr(options, n) is None}
    return replace(options, **missing)


def _sampling(options: Options) -> Any:
    from herdling.infer.sampling import Sampling

    given: dict[str, Any] = {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": None if options.top_k is None else max(0, options.top_k),
        "min_p": options.min_p,
        "typical_p": options.typical_p,
        "repetition_penalty": options.repetition_penalty,
        "presence_penalty": options.presence_penalty,
        "frequency_penalty": options.frequency_penalty,
        "logit_bias": options.logit_bias,
    }
    return Sampling(**{name: value for name, value in given.items() if value is not None})


def _offered(chat: Chat, limits: Limits) -> list[Mapping[str, Any]]:
    """The tools that the model is told of: none, all, or the one that must be called."""
    tools, choice = list(chat.tools), chat.tool_choice
    if len(tools) > limits.tools:
        raise errors.bad_request(f"{len(tools)} tools; at most {limits.tools} are allowed", "tools")
    if choice == "none":
        return []
    if choice != "auto" and not tools:
        raise errors.bad_request(
            "tool_choice asks for a call, but there are no tools", "tool_choice"
        )
    if not isinstance(choice, Mapping):
        return tools
    named = [t for t in tools if isinstance(t, Mapping) and _name(t) == choice.get("name")]
    if not named:
        raise errors.bad_request(
            f"tool_choice names {str(choice.get('name'))[:100]!r}, which is not among the tools",
            "tool_choice",
        )
    return named


def _name(tool: Mapping[str, Any]) -> Any:
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, Mapping) else None
