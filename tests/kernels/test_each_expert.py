"""Experts shared out over threads: every span once, in the caller's modes, errors and all."""

import threading

import pytest
import torch

from herdling.kernels.each_expert import FEW_ROWS, MANY, each


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def spans(experts: int, rows: int) -> list[tuple[int, int, int]]:
    return [(e, e * rows, (e + 1) * rows) for e in range(experts)]


def test_every_span_is_visited_once_and_by_several_threads(two_threads):
    asked = spans(4 * MANY, 8)
    seen, threads, counts = [], set(), set()
    both = threading.Barrier(2, timeout=10)

    def do(*span: int) -> None:
        if threading.get_ident() not in threads:
            threads.add(threading.get_ident())
            both.wait()  # neither goes on before the other has begun
        counts.add(torch.get_num_threads())
        seen.append(span)

    each(asked, do)
    assert sorted(seen) == asked
    assert len(threads) == 2
    assert counts == {1}
    assert torch.get_num_threads() == 2


def test_threads_started_later_keep_the_count_that_was_set(two_threads):
    each(spans(4 * MANY, 8), lambda *span: None)
    counts = []
    other = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert counts == [2]


@pytest.mark.parametrize("asked", [spans(2, 8), spans(4 * MANY, 1), spans(4 * MANY, FEW_ROWS), []])
def test_what_does_not_pay_stays_in_the_callers_thread(two_threads, asked):
    seen = []
    each(asked, lambda *span: seen.append((threading.get_ident(), span)))
    assert seen == [(threading.get_ident(), span) for span in asked]


def test_an_error_in_a_thread_reaches_the_caller(two_threads):
    def fail(e: int, a: int, b: int) -> None:
        if e == 5:
            raise ValueError("expert 5")

    with pytest.raises(ValueError, match="expert 5"):
        each(spans(4 * MANY, 8), fail)


def test_products_may_write_into_tensors_made_in_inference_mode(two_threads):
    with torch.inference_mode():
        out = torch.zeros(4 * MANY * 8, 4)
        ones = torch.ones(8, 4)
        each(spans(4 * MANY, 8), lambda e, a, b: torch.mm(ones, torch.eye(4), out=out[a:b]))
    assert bool((out == 1).all())
