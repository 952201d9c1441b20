"""Safeguards in the server: what comes in is judged before the engine sees it, replies while they grow.

    guarding = Guarding(judge, Policy(), metrics)
    replaced = await guarding.incoming(messages)        # raises ApiError for `block`
    deltas = guarding.outgoing(conversations).over(deltas, replies)

A judge that is a model has an engine thread of its own, in which the judgements of many calls run together.
Verdicts go to the call's log line and to /metrics, without a word of what was said.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from herdling.errors import InputError
from herdling.guard.judges import Judge, Judges, ModelJudge
from herdling.guard.policy import Action, Policy
from herdling.guard.taxonomy import Verdict, both
from herdling.guard.watch import Watch
from herdling.serve import errors
from herdling.serve.logs import note
from herdling.serve.protocol import Delta
from herdling.serve.worker import Worker

if TYPE_CHECKING:
    from herdling.infer.request import Completion, Request
    from herdling.serve.metrics import Metrics
    from herdling.serve.replies import Replies

Messages = Sequence[Any]


class Guarding:
    """The judges of one server and what follows from their verdicts."""

    def __init__(
        self,
        judge: Judge,
        policy: Policy,
        metrics: "Metrics",
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        """`on_failure(reason)` is called in the thread of a judge's engine that fails."""
        self.policy, self._metrics = policy, metrics
        self._judges = list(judge.judges) if isinstance(judge, Judges) else [judge]

        def worker(judge: ModelJudge) -> Worker:
            def failed(reason: str) -> None:
                if on_failure is not None:
                    on_failure(f"safeguard {judge.name}: {reason}")

            return Worker(judge.lm.engine, on_failure=failed)

        self._workers = {j: worker(j) for j in self._judges if isinstance(j, ModelJudge)}
        self.name = judge.name

    async def judge(self, messages: Messages) -> Verdict:
        """What the judges say of the last message. Raises ApiError where one cannot judge it."""
        try:
            return both([await self._one(judge, messages) for judge in self._judges])
        except InputError as problem:
            raise errors.bad_request(
                f"The safeguards cannot judge this conversation: {problem}"
            ) from problem

    async def _one(self, judge: Judge, messages: Messages) -> Verdict:
        if not isinstance(judge, ModelJudge):  # a long text takes a while
            return await asyncio.to_thread(judge.judge, messages)
        async with await self._workers[judge].submit([judge.request(messages)]) as tickets:
            async for _, event in tickets:
                if event.error is not None:
                    raise event.error
                if event.completion is not None:
                    return judge.verdict(event.completion)
        raise errors.unavailable("The safeguard's engine has stopped", "guard_failed")

    async def look(self, messages: Messages, where: str, told: set[tuple[str, str]]) -> Action:
        """Judge, log, count; what is to be done. `told` is what was logged of this message before."""
        verdict = await self.judge(messages)
        action = self.policy.action(verdict)
        new = {(action, name) for name in verdict.categories} - told
        if action != "ignore" and new:
            told |= new
            names = ",".join(name for what, name in sorted(told) if what == action)
            note(**{f"guard_{where}": f"{action} {names} {verdict.score:.2f} {verdict.judge}"})
            self._metrics.guarded(where, action, (name for _, name in new))
        return action

    async def incoming(self, messages: Messages) -> bool:
        """Whether the answer must be the policy's message. Raises ApiError where it is to be refused."""
        actions = set()
        for new in _asked(messages) if self.policy.input else ():
            actions.add(await self.look(new, "input", set()))
        if "block" in actions:
            raise errors.bad_request(
                "The request was stopped by this server's safeguards", code="content_filter"
            )
        return "replace" in actions

    def outgoing(self, conversations: Sequence[Messages]) -> "Watching | None":
        """Watches the replies to `conversations`, choice by choice; None where nobody wants that."""
        return Watching(self, conversations) if self.policy.output else None

    @property
    def sees(self) -> bool:
        """Whether any judge looks at pictures."""
        return any(judge.lm.processor is not None for judge in self._workers)

    def refusal(self, requests: "Sequence[Request]") -> "Refusal":
        """The policy's message as the answer to `requests`."""
        return Refusal(requests, self.policy.message)

    @property
    def busy(self) -> bool:
        """Whether a judge's engine still has its thread."""
        return any(worker.alive for worker in self._workers.values())

    def close(self) -> None:
        for worker in self._workers.values():
            worker.stop()


def _asked(messages: Messages) -> list[Messages]:
    """What comes in, up to each last message: where the caller has begun the reply, the question too."""
    end = len(messages)
    while end and messages[end - 1].get("role") == "assistant":
        end -= 1
    return [messages[:end], messages] if 0 < end < len(messages) else [messages]


@dataclass
class _Growing:
    """One reply: what is held back, and what has gone out."""

    watch: Watch
    held: list[Delta] = field(default_factory=list)
    text: str = ""
    tokens: int = 0
    calls: bool = False
    stopped: bool = False
    told: set[tuple[str, str]] = field(default_factory=set)

    def release(self) -> list[Delta]:
        self.watch.passed()
        deltas, self.held = self.held, []
        self.text += "".join(delta.text for delta in deltas)
        self.tokens += sum(len(delta.tokens) for delta in deltas)
        return deltas


class Watching:
    """Holds replies back until they were looked at, and cuts those that may not go on."""

    def __init__(self, guarding: Guarding, conversations: Sequence[Messages]) -> None:
        self._guarding = guarding
        self._choices = [_Growing(Watch(guarding.policy, c)) for c in conversations]

    async def over(self, deltas: AsyncIterator[Delta], replies: "Replies") -> AsyncIterator[Delta]:
        """The deltas that may be sent; a reply that is cut ends with `content_filter`."""
        async with aclosing(deltas):  # pyright: ignore[reportArgumentType]
            async for delta in deltas:
                for allowed in await self._take(self._choices[delta.choice], delta, replies):
                    yield allowed

    async def _take(self, reply: _Growing, delta: Delta, replies: "Replies") -> list[Delta]:
        if reply.stopped:
            return [self._ending(reply, delta)] if delta.finish is not None else []
        reply.held.append(delta)
        reply.watch.push(delta.text)
        if delta.call is not None:
            reply.watch.push(f"{delta.call.name}({delta.call.arguments})")
            reply.calls = True
        ends = delta.finish is not None
        # Calls too many for the reply are among its tokens.
        if ends and reply.calls and delta.completion:
            reply.watch.push("\n" + delta.completion.text)
        if reply.watch.due or (ends and reply.watch.waiting):
            action = await self._guarding.look(reply.watch.messages(), "output", reply.told)
            if action in ("block", "replace"):
                return self._stop(reply, delta, action, replies)
            return reply.release()
        # A token may come without its text, which is held back while it could be a call.
        waits = reply.watch.waiting or any(held.tokens for held in reply.held)
        return reply.release() if ends or not waits else []

    def _stop(
        self, reply: _Growing, delta: Delta, action: Action, replies: "Replies"
    ) -> list[Delta]:
        reply.stopped, reply.held = True, []
        replies.tickets.drop(delta.choice)
        out = []
        if action == "replace":
            reply.text += self._guarding.policy.message
            out.append(Delta(delta.choice, self._guarding.policy.message))
        return [*out, self._ending(reply, delta)] if delta.finish is not None else out

    def _ending(self, reply: _Growing, delta: Delta) -> Delta:
        """The last delta, whose completion holds nothing that was not sent."""
        completion = delta.completion and _cut(delta.completion, reply.text, reply.tokens)
        return Delta(delta.choice, finish="content_filter", completion=completion)


def _cut(completion: "Completion", text: str, tokens: int) -> "Completion":
    experts = completion.experts
    return replace(
        completion,
        text=text,
        finish_reason="cancelled",
        ids=completion.ids[:tokens],
        logprobs=completion.logprobs[:tokens],
        top=completion.top[:tokens],
        experts=None if experts is None else experts[: completion.prompt_tokens + tokens],
    )


class Refusal:
    """In the place of tickets: every choice is the policy's message, and nothing is computed."""

    def __init__(self, requests: "Sequence[Request]", message: str) -> None:
        self.requests, self._message = requests, message

    def close(self) -> None:
        """Nothing is under way."""

    def drop(self, choice: int) -> None:
        """Nothing is under way."""

    async def __aiter__(self) -> AsyncIterator[tuple[int, Any]]:
        from herdling.infer.request import Completion, Event

        for choice, request in enumerate(self.requests):
            scored = request.prompt_logprobs is not None
            nothing: list[Any] = [None] * len(request.ids)
            completion = Completion(
                self._message, [], "stop", len(request.ids), [],
                prompt=nothing if scored else None,
            )  # fmt: skip
            yield choice, Event(choice, None, 0.0, self._message, completion)
