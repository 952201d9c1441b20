"""A `herdling serve` to talk to, as a process of its own, whose environment these tests do not share.

    make clients                                        # all of it, in environments under .clients/
    HERDLING_PYTHON=.venv/bin/python .clients/sdk/bin/python -m pytest -c tests/clients/pytest.ini \
        tests/clients/test_openai.py

HERDLING_PYTHON is a Python that has Herdling (default: .venv's). HERDLING_MODEL names a model folder;
without it a nano model with random weights is made, of which nothing can be expected but form.
"""

import contextlib
import json
import os
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
PYTHON = os.environ.get("HERDLING_PYTHON", str(HERE.parents[1] / ".venv/bin/python"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Server:
    """`herdling serve FOLDER --name toy`, ready to answer."""

    def __init__(self, folder: str, *options: str, key: str = "none") -> None:
        command = [PYTHON, "-m", "herdling", "serve", folder, "--port", "0", "--name", "toy"]
        self.key = key
        self.lines: list[str] = []
        """What it wrote to stderr."""
        self._child = subprocess.Popen(
            [*command, *options], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        assert self._child.stderr is not None
        first = self._child.stderr.readline()
        self.url = first.rpartition(" ")[2].strip()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._wait(120)

    def _read(self) -> None:
        assert self._child.stderr is not None
        self.lines += self._child.stderr  # line by line, until the process ends

    def _wait(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.1)):
            with contextlib.suppress(urllib.error.URLError):
                self.get("/health")
                return
            assert self._child.poll() is None, self.lines
            time.sleep(0.1)
        raise AssertionError(f"not ready after {seconds:g} s: {self.lines}")

    def get(self, path: str) -> str:
        headers = {"Authorization": f"Bearer {self.key}"}
        call = urllib.request.Request(self.url + path, headers=headers)
        with urllib.request.urlopen(call, timeout=30) as reply:
            return reply.read().decode()

    def post(self, path: str, body: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        data = json.dumps(body).encode()
        call = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(call, timeout=30) as reply:
            return json.loads(reply.read())

    @property
    def open(self) -> int:
        """Requests that have not ended."""
        return json.loads(self.get("/herdling/status"))["queue"]["open"]

    def until_open(self, count: int, seconds: float = 10.0) -> None:
        """Wait until so many requests are open."""
        until(lambda: self.open == count, seconds)

    def metric(self, sample: str) -> float:
        """The value of a line of /metrics; 0 if it is not there yet."""
        for line in self.get("/metrics").splitlines():
            if line.startswith(sample + " "):
                return float(line.rpartition(" ")[2])
        return 0.0

    def close(self) -> int:
        """The exit status, after SIGTERM."""
        self._child.terminate()
        try:
            status = self._child.wait(40)
        finally:
            self._child.kill()
        self._reader.join(10)
        return status


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until `holds()`, at most so long."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds:g} s"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    given = os.environ.get("HERDLING_MODEL")
    if given:
        return given
    folder = tmp_path_factory.mktemp("nano") / "model"
    subprocess.run([PYTHON, str(HERE / "nano.py"), str(folder)], check=True, env=ENVIRONMENT)
    return str(folder)


@pytest.fixture(scope="session")
def server(folder: str) -> Iterator[Server]:
    """Open to all; must end with status 0, and never have answered with a 500."""
    running = Server(folder)
    yield running
    status = running.close()
    assert status == 0
    assert not [line for line in running.lines if '"level": "error"' in line], running.lines


@pytest.fixture(scope="session")
def guarded(folder: str) -> Iterator[Server]:
    """With a key, one place in the batch and one in the queue."""
    options = ("--api-key", "secret", "--max-batch", "1", "--max-queue", "1")
    running = Server(folder, *options, key="secret")
    yield running
    running.close()


@pytest.fixture(scope="session")
def trained() -> bool:
    """Whether the model was given, and so can be expected to make sense."""
    return "HERDLING_MODEL" in os.environ


def png(size: int = 32, colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    """A square picture of one colour, made without any library."""
    import struct
    import zlib

    def part(name: bytes, data: bytes) -> bytes:
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    rows = (b"\0" + bytes(colour) * size) * size
    data = part(b"IHDR", head) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.fixture(scope="session")
def picture() -> bytes:
    return png()
