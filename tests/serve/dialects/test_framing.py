"""Named events: python -m pytest tests/serve/dialects/test_framing.py"""

import asyncio

from herdling.serve import stream
from herdling.serve.dialects.framing import PAUSE, named
from herdling.serve.errors import ApiError


async def slow():
    yield {"type": "a", "text": "é\n"}
    await asyncio.sleep(0.05)
    yield {"type": "b"}
    raise ApiError(500, "no luck")


def pieces(ping: bool) -> list[str]:
    async def work():
        failed = lambda error: {"type": "error", "message": error.message}  # noqa: E731
        return [piece async for piece in named(slow(), failed, ping)]

    return asyncio.run(work())


def test_silences_are_filled_and_errors_told(monkeypatch):
    monkeypatch.setattr(stream, "_SILENCE_SECONDS", 0.02)
    first, *pauses, second, error = pieces(ping=False)
    assert first == 'event: a\ndata: {"type":"a","text":"é\\n"}\n\n'
    assert pauses
    assert set(pauses) == {PAUSE}
    assert second == 'event: b\ndata: {"type":"b"}\n\n'
    assert error == 'event: error\ndata: {"type":"error","message":"no luck"}\n\n'
    assert 'event: ping\ndata: {"type":"ping"}\n\n' in pieces(ping=True)


def test_closing_closes_the_events():
    closed = []

    async def events():
        try:
            while True:
                yield {"type": "a"}
        finally:
            closed.append(True)

    async def work():
        text = named(events(), lambda error: {"type": "error"})
        await anext(text)
        await text.aclose()
        assert closed == [True]

    asyncio.run(work())
