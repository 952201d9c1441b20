"""Server-sent events with a name, as OpenAI's Responses and Anthropic's Messages stream them.

    EventStream(named(events(), failed=lambda error: {"type": "error", ...}), request)

Each event is an object whose `type` is also its name. An error becomes the event that `failed` makes
of it, and the last.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from herdling.serve import stream
from herdling.serve.errors import ApiError

Event = dict[str, Any]
PAUSE = ": still working\n\n"
_PING = stream.event({"type": "ping"}, "ping")


async def named(
    events: AsyncIterator[Event], failed: Callable[[ApiError], Event], ping: bool = False
) -> AsyncIterator[str]:
    """The text of a stream. In long silences goes out a `ping` event, or else a comment."""
    try:
        pieces: Any = stream._with_pauses(events)
        async with aclosing(pieces):
            async for event in pieces:
                if event is stream._PAUSE:
                    yield _PING if ping else PAUSE
                else:
                    yield stream.event(event, event["type"])
    except Exception as problem:
        event = failed(stream.told(problem))
        yield stream.event(event, event["type"])
