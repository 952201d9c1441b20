"""The life of the process: python -m pytest tests/serve/test_server.py"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

import herdling
from herdling import cli
from herdling.errors import CheckpointError, ConfigError
from herdling.serve import server
from herdling.serve.service import Settings

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def folder(lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "model"
    herdling.save(lm, folder)
    return folder


class Process:
    """`herdling serve` as a child."""

    def __init__(self, *args: str) -> None:
        command = [sys.executable, "-m", "herdling", "serve", *args, "--port", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.child.stderr is not None
        self.first = self.child.stderr.readline()
        self.url = self.first.rpartition(" ")[2].strip()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.child.kill()
        self.child.communicate()

    def until_ready(self) -> list[int]:
        """Every status of /health up to the first 200."""
        seen = []
        for _ in range(600):
            seen.append(httpx.get(f"{self.url}/health", timeout=10).status_code)
            if seen[-1] == 200:
                return seen
            time.sleep(0.05)
        raise AssertionError("it never was ready")

    def end(self, number: int) -> tuple[int, list[dict]]:
        """Status and log lines after a signal."""
        self.child.send_signal(number)
        return self.ended()

    def ended(self) -> tuple[int, list[dict]]:
        _, errors = self.child.communicate(timeout=30)
        return self.child.returncode, [json.loads(line) for line in errors.splitlines()]


def test_from_the_open_port_to_the_end(folder):
    """503 while loading; SIGTERM: short replies end, long ones are cut and answered, status 0."""
    said: dict[str, str] = {}

    def stream(name: str, tokens: int) -> None:
        body = {**BODY, "stream": True, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        with httpx.stream("POST", process.url + CHAT, json=body, timeout=30) as reply:
            begun.release()
            said[name] = "".join(reply.iter_text())

    with Process(str(folder), "--shutdown-seconds", "0.5", "--name", "toy") as process:
        assert process.first.startswith("toy on http://127.0.0.1:")
        early = process.until_ready()
        assert set(early[:-1]) <= {503}
        begun = threading.Semaphore(0)
        calls = [("short", 3), ("long", 1900)]
        threads = [threading.Thread(target=stream, args=call) for call in calls]
        for thread in threads:
            thread.start()
        for _ in threads:
            begun.acquire()
        began = time.monotonic()
        status, lines = process.end(signal.SIGTERM)
        took = time.monotonic() - began
        for thread in threads:
            thread.join()
    assert status == 0
    assert took < 10
    for text in said.values():
        assert text.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"length"' in text
    assert said["short"].count("chat.completion.chunk") <= 5
    assert said["long"].count("chat.completion.chunk") < 1900
    messages = [line["message"] for line in lines]
    assert any("ready" in message for message in messages)
    assert messages[-1] == "stopped"
    access = [line for line in lines if line["message"] == "call"]
    assert {line["status"] for line in access} == {200}
    assert all(line["level"] == "info" and line["time"] for line in access)


def test_stopping_while_it_loads(folder):
    with Process(str(folder)) as process:
        status, lines = process.end(signal.SIGINT)
    assert status == 0
    assert [line["message"] for line in lines] == ["stopping: SIGINT", "stopped"]


def test_a_folder_that_is_not_there_is_told_before_the_port_opens(tmp_path, capsys):
    assert cli.main(["serve", str(tmp_path / "nothing")]) == 1
    assert "no such folder" in capsys.readouterr().err


# ---- in this process, in a thread, for what needs an engine that misbehaves


def running(load) -> tuple[str, threading.Thread, list[int]]:
    opened, ready, statuses = [], threading.Event(), []

    def on_open(url: str) -> None:
        opened.append(url)
        ready.set()

    thread = threading.Thread(
        target=lambda: statuses.append(server.run(Settings(), load, port=0, on_open=on_open)),
        daemon=True,
    )
    thread.start()
    assert ready.wait(10)
    return opened[0], thread, statuses


def test_an_engine_that_fails_is_told_and_ends_the_process(lm, engine, monkeypatch):
    class Broken:
        """The model with that engine."""

        def __getattr__(self, name):
            return engine if name == "engine" else getattr(lm, name)

    engine.crash = RuntimeError("out of luck")
    url, thread, statuses = running(Broken)
    while httpx.get(f"{url}/health").json()["status"] == "loading":
        time.sleep(0.01)
    reply = httpx.post(f"{url}/v1/completions", json={"prompt": "hello"})
    health = httpx.get(f"{url}/health")
    thread.join(10)
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "engine_failed"
    assert (health.status_code, health.json()["reason"]) == (503, "RuntimeError: out of luck")
    assert statuses == [1]


def test_a_model_that_cannot_be_loaded_is_told_and_ends_the_process():
    def load():
        raise CheckpointError("model.safetensors is cut short")

    url, thread, statuses = running(load)
    health = httpx.get(f"{url}/health")
    thread.join(10)
    assert (health.status_code, health.json()["reason"]) == (503, "model.safetensors is cut short")
    assert statuses == [1]


def test_an_address_that_is_taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match="--port"):
            server.bind("127.0.0.1", other.getsockname()[1])
    with pytest.raises(ConfigError):
        server.bind("no.such.host.invalid", 80)
    with pytest.raises(ConfigError):
        server.bind("127.0.0.1", 70000)
