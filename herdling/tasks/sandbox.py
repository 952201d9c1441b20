"""Python that a model wrote, run where it can do no harm.

    outcome = run("def double(x):\n    return 2 * x", ["double(4)", "double('ab')"])
    outcome.values                                                              # [8, "abab"]

A process of its own computes the values and nothing else: `herdling.tasks.jail` says how it confines
itself, with or without root. From outside it gets an empty environment, a bound on what it may print,
and a time after which it is killed. What the values ought to be is never told to it, so code can only
be right by computing them.

Linux on x86-64 or aarch64; elsewhere, and where the kernel refuses, `run` raises SandboxError.
"""

import contextlib
import functools
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from herdling.errors import ConfigError, Error
from herdling.tasks import jail

_LONGEST_CODE = 100_000
_CHUNK = 65536
_CONFINED = "confined"


class SandboxError(Error):
    """This machine cannot confine a process, so no foreign code is run."""


@dataclass(frozen=True)
class Limits:
    """What the code may use."""

    seconds: float = 4.0
    """From start to kill."""
    cpu: int = 2
    """Seconds of a processor."""
    memory: int = 256 * 2**20
    """Bytes of address space."""
    output: int = 64 * 2**10
    """Bytes printed and answered."""

    def __post_init__(self) -> None:
        if self.seconds <= 0 or self.cpu < 1 or self.memory < 2**26 or self.output < 1:
            raise ConfigError(
                f"{self}: seconds must be above 0, cpu and output at least 1, memory at least 64 MB"
            )


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    values: list[Any] = field(default_factory=list)
    """Of the calls, in order, as JSON has them (tuples are lists, sets sorted lists, a dict is
    {"": [[key, value], ...]}, sorted); fewer than the calls if there is an error."""
    printed: str = ""
    error: str = ""
    """Empty, the exception as `Name: message`, or what stopped the code: `timeout`, `too much output`,
    `ended without an answer` (too much memory or CPU time, a crash, or an exit)."""
    seconds: float = 0.0


def run(
    code: str, calls: Sequence[str] = (), limits: Limits | None = None, setup: str = ""
) -> Outcome:
    """Run `setup` and `code`, then evaluate each of `calls` in their namespace.

    Whatever the code does ends up in the outcome. Raises SandboxError where it cannot be confined.
    """
    check()
    if len(code) > _LONGEST_CODE:
        return Outcome(error=f"more than {_LONGEST_CODE} characters")
    return _run(setup, code, calls, limits or Limits())[1]


@functools.cache
def check() -> None:
    """Raise SandboxError unless a harmless piece of code runs here, confined; asked once a process."""
    remedy = "remedy: Linux on x86-64 or aarch64, in a container that allows seccomp"
    if reason := jail.missing():
        raise SandboxError(f"foreign code cannot be confined here: {reason}; {remedy}")
    first, outcome = _run("", "", ["1 + 1"], Limits(seconds=60.0))
    if first != _CONFINED or outcome.values != [2]:
        reason = first[:200] or outcome.error
        raise SandboxError(f"foreign code cannot be confined here: {reason}; {remedy}")


def _run(setup: str, code: str, calls: Sequence[str], limits: Limits) -> tuple[str, Outcome]:
    """The first line of the process, which the code cannot have written, and what came of it."""
    request = {"setup": setup, "code": code, "calls": list(calls)}
    request |= {"cpu": limits.cpu, "memory": limits.memory}
    started = time.perf_counter()
    written, error = _process(json.dumps(request).encode(), limits)
    seconds = time.perf_counter() - started
    first, _, printed = written.decode("utf-8", "replace").partition("\n")
    values: list[Any] = []
    if not error:
        printed, _, last = printed.removesuffix("\n").rpartition("\n")
        values, error = _read(last if first == _CONFINED else "", len(calls))
    return first, Outcome(values, printed.removesuffix("\n"), error, seconds)


def _read(line: str, calls: int) -> tuple[list[Any], str]:
    """(values, error) of the reply, which the code may have forged."""
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError):
        reply = None
    match reply:
        case {"values": list(values), "error": str(error)} if len(values) == calls or error:
            return values[:calls], error
    return [], "ended without an answer"


def _process(request: bytes, limits: Limits) -> tuple[bytes, str]:
    """(what the process wrote, why it was stopped); it is gone afterwards."""
    command = [sys.executable, "-I", "-S", "-B", "-W", "ignore", str(Path(jail.__file__))]
    with subprocess.Popen(
        command,
        cwd="/",
        env={},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            return _talk(process, request, limits)
        finally:
            # It can start nothing; but should the filter ever fail, its whole group goes.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _talk(process: subprocess.Popen[bytes], request: bytes, limits: Limits) -> tuple[bytes, str]:
    """Hand the request in and read until the process closes its output, or must be stopped."""
    assert process.stdin is not None
    assert process.stdout is not None
    deadline = time.monotonic() + limits.seconds
    written, left = bytearray(), memoryview(request)
    os.set_blocking(process.stdin.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        while True:
            remaining = deadline - time.monotonic()
            # The clock is asked as well: whoever prints without end is always ready.
            ready = selector.select(max(0.0, remaining))
            if not ready or remaining <= 0:
                return bytes(written), "timeout"
            for key, _ in ready:
                if key.fileobj is process.stdin:
                    left = _hand_in(process.stdin, left)
                    if not left:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                    continue
                chunk = os.read(process.stdout.fileno(), _CHUNK)
                if not chunk:
                    return bytes(written), ""
                written += chunk
                if len(written) > limits.output:
                    return bytes(written[: limits.output]), "too much output"


def _hand_in(pipe: Any, left: memoryview) -> memoryview:
    try:
        return left[os.write(pipe.fileno(), left) :]
    except BlockingIOError:
        return left
    except BrokenPipeError:  # it ended before it had read everything
        return left[:0]
