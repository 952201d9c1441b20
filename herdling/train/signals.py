"""Ctrl-C and SIGTERM as a wish: the loop finishes its step, saves, and then stops."""

import os
import signal
import threading
from types import FrameType
from typing import Any

from herdling import distributed


class Stopped(KeyboardInterrupt):
    """The run was asked to stop and is saved; the command line exits with `status`.

    A KeyboardInterrupt, so that no `except Exception` on the way mistakes it for a failure.
    """

    saved = True

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.status = 128 + number


class StopSignals:
    """While entered, SIGINT and SIGTERM set `wanted`; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.wanted = 0
        """The number of the signal that came, or 0."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        # Python allows handlers in the main thread only; elsewhere nobody sends us Ctrl-C.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.wanted and number == signal.SIGINT:
            raise KeyboardInterrupt("stopped at once; the last checkpoint stands")
        self.wanted = number
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    def agreed(self) -> int:
        """The signal that any of the processes heard, the same on all."""
        return distributed.largest(self.wanted)
