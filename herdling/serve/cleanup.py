"""What must be given back when a call ends, however it ends.

    with scope():
        at_end(tickets.close)

A stream that is left before its first piece never runs, and so cannot clean up after itself; the call
that it belongs to can.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

_stack: contextvars.ContextVar[contextlib.ExitStack | None] = contextvars.ContextVar(
    "stack", default=None
)


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """One call; tasks that are started within belong to it too."""
    with contextlib.ExitStack() as stack:
        token = _stack.set(stack)
        try:
            yield
        finally:
            _stack.reset(token)


def at_end(close: Callable[[], None]) -> None:
    """Do `close()` when the current call ends; outside of any call this does nothing."""
    if (stack := _stack.get()) is not None:
        stack.callback(close)
