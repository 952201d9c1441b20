"""schemathesis over our OpenAPI document: whatever is sent, no 5xx and no hang.

Bounded: EXAMPLES bodies an operation (20), each within SECONDS (20). What a reply may hold is capped at
start, so that no example is long for want of a limit.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Server

EXAMPLES = os.environ.get("EXAMPLES", "20")
SECONDS = os.environ.get("SECONDS_EACH", "20")


@pytest.fixture(scope="module")
def bounded(folder: str) -> Iterator[Server]:
    running = Server(folder, "--max-tokens", "8", "--log-level", "warning")
    yield running
    assert running.close() == 0
    assert not [line for line in running.lines if '"level": "error"' in line], running.lines


def test_no_server_error_and_no_hang(bounded, tmp_path):
    command = [str(Path(sys.executable).with_name("schemathesis"))]
    command += ["run", f"{bounded.url}/openapi.json", "--url", bounded.url]
    command += ["--checks", "not_a_server_error", "--max-examples", EXAMPLES]
    command += [
        "--request-timeout",
        SECONDS,
        "--phases",
        "examples,coverage,fuzzing",
        "--seed",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, cwd=tmp_path)
    print(done.stdout[-4000:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert '"ok"' in bounded.get("/health")
    bounded.until_open(0)
