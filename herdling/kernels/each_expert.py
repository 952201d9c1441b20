"""Work on many experts at once: one thread an expert, where an expert alone is too little for all threads.

A product of some hundred rows does not fill two threads, and what the second one costs is paid for
every expert: 128 experts of 128 rows took a third longer than 4 of 4,096. torch.mm lets go of
Python's lock while it computes, so a few Python threads, each with torch's own threading off, take
the experts off one list. Large products and few experts stay with torch's threads.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier

import torch

Span = tuple[int, int, int]
"""(expert, first row, end row)."""

FEW_ROWS = 512
"""Mean rows an expert below which one thread an expert is faster (measured at widths 256 and 512)."""
MANY = 4
"""Experts a thread from which on the threads end about together."""


def each(spans: Sequence[Span], do: Callable[[int, int, int], None]) -> None:
    """Call `do(expert, first, end)` for every span, in any order and perhaps at the same time."""
    threads = torch.get_num_threads()
    if not spans or not _pays(spans, threads):
        for span in spans:
            do(*span)
        return
    # Largest first, so that the last ones to end are short; popping a list is atomic.
    left = sorted(spans, key=lambda span: span[2] - span[1])
    inference = torch.is_inference_mode_enabled()  # like no_grad, a state of the thread

    def work(_: int) -> None:
        while True:
            try:
                span = left.pop()
            except IndexError:
                return
            with torch.inference_mode(inference), torch.no_grad():
                do(*span)

    list(_pool(threads).map(work, range(threads)))  # also raises what a thread raised


def _pays(spans: Sequence[Span], threads: int) -> bool:
    rows = spans[-1][2] - spans[0][1]
    few = 1 < rows / len(spans) < FEW_ROWS
    return threads > 1 and few and len(spans) >= MANY * threads


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    started = Barrier(threads + 1)

    def single() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread's first look takes the default; later it keeps its own
        started.wait()

    pool = ThreadPoolExecutor(threads, "experts", initializer=single)
    for _ in range(threads):
        pool.submit(lambda: None)
    started.wait()
    # torch keeps the last count it was told as the default of new threads: give it ours back.
    torch.set_num_threads(threads)
    return pool
