"""The engine's thread: python -m pytest tests/serve/test_worker.py"""

import asyncio
import logging
import threading
import time

import pytest

from herdling.errors import Error, InputError
from herdling.infer.request import Request
from herdling.serve.errors import ApiError
from herdling.serve.worker import Worker

WORDS = "the dog sleeps"


@pytest.fixture
def worker(engine):
    engine.script = lambda request: WORDS
    worker = Worker(engine, queue=3)
    yield worker
    engine.go.set()
    worker.stop()


def request(tok, **options) -> Request:
    return Request([tok.bos, *tok.encode("hello")], stop_ids=tuple(tok.stop_ids), **options)


async def texts(tickets) -> dict[int, str]:
    found = {}
    async with tickets:
        async for choice, event in tickets:
            found[choice] = found.get(choice, "") + event.text
    return found


async def until(condition) -> None:
    for _ in range(400):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came about")


def test_events_come_back_in_order_for_every_request(worker, engine, tok):
    async def go():
        tickets = [await worker.submit([request(tok), request(tok)]) for _ in range(3)]
        return await asyncio.gather(*map(texts, tickets))

    assert asyncio.run(go()) == [{0: WORDS, 1: WORDS}] * 3
    assert engine.threads == {"engine"}
    assert worker.open == 0


def test_a_request_that_cannot_be_taken_takes_its_siblings_back(worker, engine, tok):
    async def go():
        with pytest.raises(InputError, match="max_position_embeddings"):
            await worker.submit([request(tok), Request([1] * 3000)])
        return await texts(await worker.submit([request(tok)]))

    assert asyncio.run(go()) == {0: WORDS}
    assert engine.cancelled == [0]
    assert worker.open == 0


def test_leaving_cancels_before_the_next_step(worker, engine, tok):
    engine.endless = True

    async def go():
        async with await worker.submit([request(tok, max_tokens=400)]) as tickets:
            async for _ in tickets:
                engine.go.clear()
                await asyncio.sleep(0.02)  # the engine waits within a step
                break
        at = engine.steps
        engine.go.set()
        await until(lambda: engine.cancelled)
        return engine.steps - at

    # The step under way, and the one that reports the end.
    assert asyncio.run(go()) <= 2
    assert worker.open == 0


def test_leaving_before_being_let_in(worker, engine, tok):
    async def go():
        engine.go.clear()
        first = await worker.submit([request(tok)])
        await until(lambda: engine.threads)
        task = asyncio.create_task(worker.submit([request(tok)]))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        engine.go.set()
        return await texts(first)

    assert asyncio.run(go()) == {0: WORDS}
    assert worker.open == 0


def test_too_many_waiting_are_refused_with_a_time(worker, engine, tok):
    async def go():
        engine.go.clear()
        held = [await worker.submit([request(tok)])]
        await until(lambda: engine.threads)
        tasks = [asyncio.create_task(worker.submit([request(tok)])) for _ in range(2)]
        await until(lambda: worker.waiting == 3)
        with pytest.raises(ApiError) as refused:
            await worker.submit([request(tok)])
        engine.go.set()
        held += await asyncio.gather(*tasks)
        await asyncio.gather(*map(texts, held))
        assert await texts(await worker.submit([request(tok)])) == {0: WORDS}
        return refused.value

    error = asyncio.run(go())
    assert error.status == 429
    assert int(error.headers["Retry-After"]) >= 1


def test_what_takes_too_long_is_cut_and_told(worker, engine, tok):
    engine.endless, engine.pause = True, 0.005

    async def go():
        last = None
        async with await worker.submit([request(tok, max_tokens=400)], 0.1) as tickets:
            async for _, event in tickets:
                last = event
        return last

    event = asyncio.run(go())
    assert event is not None
    assert event.completion is not None
    assert event.completion.finish_reason == "cancelled"
    assert 0 < len(event.completion.ids) < 400


def test_work_between_steps(worker, engine, tok):
    def fail():
        raise ValueError("not today")

    async def go():
        engine.pause = 0.002
        reading = asyncio.create_task(texts(await worker.submit([request(tok)])))
        name = await worker.call(lambda: threading.current_thread().name)
        with pytest.raises(ValueError, match="not today"):
            await worker.call(fail)
        assert await reading == {0: WORDS}
        return name

    assert asyncio.run(go()) == "engine"
    assert worker.failure is None


def test_one_failing_request_harms_no_other(worker, engine, tok):
    engine.poison = lambda request: Error("its logits are not finite") if request.priority else None

    async def go():
        bad, good = (
            await worker.submit([request(tok, priority=1)]),
            await worker.submit([request(tok)]),
        )
        events = [event async for _, event in bad]
        return events, await texts(good)

    events, good = asyncio.run(go())
    assert [str(event.error) for event in events] == ["its logits are not finite"]
    assert good == {0: WORDS}
    assert worker.failure is None


def test_an_engine_that_fails_fails_all_and_says_why(engine, tok, caplog):
    reasons = []
    worker = Worker(engine, on_failure=reasons.append)

    async def go():
        engine.go.clear()
        open_ = [await worker.submit([request(tok)])]
        await until(lambda: engine.threads)
        call = asyncio.create_task(worker.call(lambda: 1))
        late = asyncio.create_task(worker.submit([request(tok)]))
        await asyncio.sleep(0.02)
        engine.crash = RuntimeError("out of luck")
        engine.go.set()
        errors = await asyncio.gather(texts(open_[0]), call, late, return_exceptions=True)
        with pytest.raises(ApiError) as refused:
            await worker.submit([request(tok)])
        return errors, refused.value

    with caplog.at_level(logging.CRITICAL):
        errors, refused = asyncio.run(go())
    assert [getattr(error, "status", error) for error in errors] == [500, 500, 500]
    assert refused.status == 503
    assert reasons == [worker.failure] == ["RuntimeError: out of luck"]
    assert "out of luck" in caplog.text
    assert not worker.alive


def test_stopping_answers_what_is_open(engine, tok):
    worker = Worker(engine)
    engine.endless = True

    async def go():
        tickets = await worker.submit([request(tok, max_tokens=400)])
        await asyncio.to_thread(worker.stop)
        with pytest.raises(ApiError) as error:
            await texts(tickets)
        with pytest.raises(ApiError):
            await worker.submit([request(tok)])
        return error.value.status

    assert asyncio.run(go()) == 503
    assert not worker.alive


def test_cutting_all_lets_everybody_end(worker, engine, tok):
    engine.endless, engine.pause = True, 0.002

    async def go():
        tickets = [await worker.submit([request(tok, max_tokens=400)]) for _ in range(3)]
        reading = asyncio.gather(*map(texts, tickets))
        assert not await worker.drained(0.05)
        worker.cut_all()
        assert await worker.drained(5)
        return await reading

    assert len(asyncio.run(go())) == 3


def test_counts_are_there_when_idle(worker, tok):
    async def go():
        await texts(await worker.submit([request(tok)]))

    asyncio.run(go())
    for _ in range(100):
        if worker.stats is not None and worker.stats.running == 0:
            break
        time.sleep(0.01)
    assert worker.stats is not None
    assert worker.stats.running == 0
