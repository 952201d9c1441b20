"""curl: a stream comes piece by piece (-N), and killing curl ends the reply."""

import json
import shutil
import subprocess
import time
from typing import Any

import pytest

CURL = shutil.which("curl")
needs_curl = pytest.mark.skipif(CURL is None, reason="curl is not installed")


def curl(server, body: Any) -> subprocess.Popen[str]:
    command = [str(CURL), "-sN", f"{server.url}/v1/chat/completions"]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def ask(tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello"}]
    return {"messages": messages, "max_tokens": tokens, "stream": True, "ignore_eos": True}


@needs_curl
def test_pieces_come_one_by_one(server):
    times, lines = [], []
    with curl(server, ask(200)) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                lines.append(line.strip())
                times.append(time.monotonic())
    assert process.returncode == 0
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)
    assert len({round(t, 3) for t in times}) > 20  # not all at the end


@needs_curl
def test_killing_curl_ends_the_reply(server):
    sample = 'herdling_requests_total{route="/v1/chat/completions",status="499"}'
    before = server.metric(sample)
    with curl(server, ask(3000)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        server.until_open(1)
        process.kill()
    began = time.monotonic()
    server.until_open(0, 5)
    assert server.metric("herdling_requests_running") == 0 or time.monotonic() - began < 5
    assert server.metric(sample) == before + 1
