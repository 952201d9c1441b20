"""How many threads native kernels use, and a pause for torch's own while they do.

torch's OpenMP workers go on spinning for some milliseconds after each parallel operation, on the cores
that the native pool wants: between small operations that takes more than it gives. Within `alone()`
torch keeps to the calling thread, and native kernels have all threads that torch had.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_own: ContextVar[int | None] = ContextVar("native_threads", default=None)


def threads() -> int:
    """Threads of a native kernel that is called now."""
    return _own.get() or torch.get_num_threads()


@contextmanager
def alone() -> Iterator[None]:
    """Let only native kernels use more than one thread."""
    count = threads()
    token = _own.set(count)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _own.reset(token)
        torch.set_num_threads(count)
