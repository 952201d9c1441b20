"""Many clients on one server, for minutes: is any answer lost or crossed, does memory stay flat?

    python benchmarks/serving_load.py [--seconds 300] [--clients 64] [--model FOLDER] [--hogs 2]

Serves a model in a process of its own (a random-weights `nano` made on the spot, if none is given) and
asks it from many clients at once. Every client does one thing after another, drawn at random:

- *answers*: chat whole and streamed, JSON schema, Ollama's API, a picture, a long prompt. Each carries a
  nonce, and a grammar lets the reply be nothing but that nonce, so an answer that went to another
  client would show. *repeat* instead continues one of a few fixed prompts greedily, without a grammar,
  and must get to the letter what it got when it was asked alone.
- *cancel* closes a stream after some pieces, *leave* hangs up while waiting for a long reply.
- *hostile* sends what no client should: broken or huge or deep JSON, wrong types, bad pictures,
  impossible grammars, garbage, half a request. Anything but 4xx (or a closed connection) is a fault.

Before that, tokens a second of 1 and of 8 replies at a time. Prints one JSON object; exit status 1
names the bars that were missed. Client and server share the machine: rates are of both together.
`--hogs` adds that many processes that do nothing but use a core each, while the clients ask.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

PATIENCE = 60.0
"""Seconds after which an answer counts as lost."""
SPEEDUP = 1.5
GROWTH = 0.05
"""Most that memory may grow from the second quarter of the run to the last, as a share."""
FAIR = 8.0
"""Most that the slowest hundredth of a kind of answer may take, in medians of that kind."""
REPEATS = 6
"""Fixed prompts of *repeat*."""


# ---- the server


def make_model(folder: Path) -> None:
    """Nano with pictures, random weights, 4096 positions."""
    from dataclasses import replace

    import herdling
    from herdling.data.embedded import texts
    from herdling.infer.lm import LM
    from herdling.inputs.tokenizer import Tokenizer
    from herdling.model.config import preset
    from herdling.model.init import initialize
    from herdling.model.llama import build

    tok = Tokenizer.train(texts("train", limit=200_000), 1024)
    config = preset("nano", vision=True, vocab_size=len(tok), max_position_embeddings=4096)
    marks = {
        "image_token_index": tok.patch,
        "boi_token_index": tok.special("<|image_start|>"),
        "eoi_token_index": tok.special("<|image_end|>"),
    }
    model = initialize(build(replace(config, **marks)), seed=0, std=0.12)
    herdling.save(LM(model.eval(), tok), folder)


class Server:
    """`herdling serve` as a child, its memory and its complaints."""

    def __init__(self, folder: Path, options: list[str]) -> None:
        command = [sys.executable, "-m", "herdling", "serve", str(folder), "--port", "0"]
        command += ["--name", "load", "--log-level", "warning", "--log-format", "json", *options]
        self.child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.child.stderr is not None
        self.url = self.child.stderr.readline().rpartition(" ")[2].strip()
        self.complaints: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                self.status()
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            if self.child.poll() is not None or time.monotonic() > end:
                sys.exit(f"the server did not start: {self.complaints}")
            time.sleep(0.1)

    def _read(self) -> None:
        assert self.child.stderr is not None
        for line in self.child.stderr:
            if '"level": "error"' in line or '"level"' not in line:
                self.complaints.append(line.strip()[:500])

    def status(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/herdling/status", timeout=10) as reply:
            return json.loads(reply.read())

    def resident(self) -> float:
        """MiB."""
        for line in Path(f"/proc/{self.child.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        return 0.0

    def stop(self) -> int:
        self.child.terminate()
        try:
            return self.child.wait(60)
        finally:
            self.child.kill()
            self._reader.join(5)


@contextlib.contextmanager
def hogs(count: int) -> Iterator[None]:
    """Processes that want a core each, for as long as the block lasts."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for child in busy:
            child.kill()
            child.wait()


# ---- what clients do


class Fault(Exception):
    """An answer that should not have been."""


class Load:
    """The clients' common state: what came back, and how long it took."""

    def __init__(self, server: Server, api: httpx.AsyncClient) -> None:
        self.server, self.api = server, api
        self.took: dict[str, list[float]] = defaultdict(list)
        self.ended: list[float] = []
        """When each call ended, of the monotonic clock."""
        self.first: list[float] = []
        """Seconds to the first piece of a stream."""
        self.counts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.expected: list[str] = []
        self.picture = _data_uri(96)
        self.kinds: dict[str, tuple[float, Callable[[random.Random], Awaitable[None]]]] = {
            "chat": (4, self.chat),
            "stream": (4, self.stream),
            "schema": (2, self.schema),
            "ollama": (1, self.ollama),
            "picture": (2, self.with_picture),
            "long": (1, self.long),
            "repeat": (3, self.repeat),
            "cancel": (1, self.cancel),
            "leave": (1, self.leave),
            "hostile": (2, self.hostile),
        }

    async def client(self, number: int, seed: int, until: float, names: list[str]) -> None:
        draw = random.Random(seed * 1000 + number)
        weights = [self.kinds[name][0] for name in names]
        while time.monotonic() < until:
            [name] = draw.choices(names, weights)
            begun = time.monotonic()
            try:
                async with asyncio.timeout(PATIENCE):
                    await self.kinds[name][1](draw)
            except TimeoutError:
                self.faults[f"{name}: lost, no answer in {PATIENCE:g} s"] += 1
            except (httpx.HTTPError, OSError) as problem:
                self.faults[f"{name}: lost, {type(problem).__name__} {problem}"[:200]] += 1
            except (Fault, ValueError, KeyError, IndexError) as problem:
                self.faults[f"{name}: {type(problem).__name__} {problem}"[:300]] += 1
            self.counts[name] += 1
            self.ended.append(time.monotonic())
            self.took[name].append(self.ended[-1] - begun)

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        reply = await self.api.post(path, json=body)
        if reply.status_code != 200:
            raise Fault(f"{reply.status_code} {reply.text[:150]}")
        return reply.json()

    async def pieces(self, body: dict[str, Any]) -> AsyncIterator[str]:
        """Contents of a streamed chat; closing it closes the connection."""
        path = "/v1/chat/completions"
        async with self.api.stream("POST", path, json={**body, "stream": True}) as reply:
            if reply.status_code != 200:
                raise Fault(f"{reply.status_code} {(await reply.aread())[:150]!r}")
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    return
                if line:
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise Fault(chunk["error"]["message"])
                    yield chunk["choices"][0]["delta"].get("content") or ""
        raise Fault("a stream ended without [DONE]")

    async def answered(self, body: dict[str, Any], nonce: str) -> None:
        reply = await self.post("/v1/chat/completions", body)
        same(reply["choices"][0]["message"]["content"], nonce)

    async def chat(self, draw: random.Random) -> None:
        text = nonce(draw)
        await self.answered(ask(text), text)

    async def stream(self, draw: random.Random) -> None:
        text, begun, said = nonce(draw), time.monotonic(), []
        async for piece in self.pieces(ask(text)):
            if piece and not any(said):
                self.first.append(time.monotonic() - begun)
            said.append(piece)
        same("".join(said), text)

    async def schema(self, draw: random.Random) -> None:
        text = nonce(draw)
        form = {"type": "json_schema", "json_schema": {"name": "echo", "schema": const(text)}}
        reply = await self.post("/v1/chat/completions", {**ask(text), "response_format": form})
        same(json.loads(reply["choices"][0]["message"]["content"])["nonce"], text)

    async def ollama(self, draw: random.Random) -> None:
        text = nonce(draw)
        body = {"model": "load", "messages": ask(text)["messages"], "stream": False}
        options = {"format": const(text), "options": {"num_predict": 400}}
        reply = await self.post("/api/chat", {**body, **options})
        same(json.loads(reply["message"]["content"])["nonce"], text)

    async def with_picture(self, draw: random.Random) -> None:
        text = nonce(draw)
        parts = [
            {"type": "image_url", "image_url": {"url": self.picture}},
            {"type": "text", "text": f"Say {text}"},
        ]
        await self.answered({**ask(text), "messages": [{"role": "user", "content": parts}]}, text)

    async def long(self, draw: random.Random) -> None:
        text = nonce(draw)
        filler = " ".join(f"{draw.randrange(10**6)}" for _ in range(250))
        messages = [{"role": "user", "content": f"{filler}\nSay {text}"}]
        await self.answered({**ask(text), "messages": messages}, text)

    async def repeat(self, draw: random.Random) -> None:
        which = draw.randrange(REPEATS)
        same(await self.continued(which), self.expected[which])

    async def continued(self, which: int) -> str:
        body = {"prompt": f"The number {which} is", "max_tokens": 24, "temperature": 0}
        return (await self.post("/v1/completions", body))["choices"][0]["text"]

    async def cancel(self, draw: random.Random) -> None:
        body = {**endless(draw), "temperature": 1.0}
        wanted, got = draw.randrange(1, 12), 0
        async with contextlib.aclosing(self.pieces(body)) as pieces:
            async for _ in pieces:
                got += 1
                if got == wanted:
                    return

    async def leave(self, draw: random.Random) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(draw.uniform(0.01, 0.4)):
                await self.post("/v1/chat/completions", endless(draw))

    async def hostile(self, draw: random.Random) -> None:
        if draw.random() < 0.25:
            await self.garbage(draw)
            return
        path, data = draw.choice(hostile_bodies())
        headers = {"content-type": "application/json"}
        reply = await self.api.post(path, content=data, headers=headers)
        if not 400 <= reply.status_code < 500:
            raise Fault(f"{reply.status_code} to {data[:60]!r}: {reply.text[:100]}")

    async def garbage(self, draw: random.Random) -> None:
        """Bytes that are no request, or a request whose body never ends; then hang up."""
        host, port = self.server.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        half = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n"
            + b'{"mes'
        )
        writer.write(
            draw.choice([draw.randbytes(200) + b"\r\n\r\n", half, b"GET / HTTP/9\r\n\r\n"])
        )
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(0.3):
                if b" 500 " in await reader.read(100):
                    raise Fault("500 to garbage")
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def nonce(draw: random.Random) -> str:
    """Letters and digits in some words, of no fixed length."""
    return " ".join(f"{draw.getrandbits(32):08x}" for _ in range(draw.choice([1, 2, 4, 8])))


def same(got: str, wanted: str) -> None:
    if got != wanted:
        raise Fault(f"crossed or cut: {got[:80]!r} for {wanted[:80]!r}")


def ask(text: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Say {text}"}]
    form = {"type": "regex", "regex": text}
    return {"model": "load", "messages": messages, "response_format": form, "max_tokens": 400}


def const(text: str) -> dict[str, Any]:
    fields = {"type": "object", "properties": {"nonce": {"const": text}}, "required": ["nonce"]}
    return {**fields, "additionalProperties": False}


def endless(draw: random.Random) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Count from {draw.randrange(1000)}"}]
    return {"messages": messages, "max_tokens": 3000, "ignore_eos": True}


def _data_uri(size: int) -> str:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((size, size)).convert("RGB").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def hostile_bodies() -> list[tuple[str, bytes]]:
    """Paths and bodies that must be refused."""
    chat, hello = "/v1/chat/completions", [{"role": "user", "content": "hello"}]
    bad_image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    inside = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:22/x.png"}}
    looped = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/a"}}}
    backward = {"type": "regex", "regex": "(a)(?<=b)\\1"}
    bodies: list[dict[str, Any]] = [
        {},
        {"messages": []},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": hello, "temperature": -1},
        {"messages": hello, "n": 10**9},
        {"messages": hello, "max_tokens": -5},
        {"messages": hello, "logit_bias": {"x": 1}},
        {"messages": hello, "stop": ["x"] * 1000},
        {"messages": hello, "model": "no such model"},
        {"messages": hello, "response_format": looped},
        {"messages": hello, "response_format": backward},
        {"messages": [{"role": "user", "content": [bad_image]}]},
        {"messages": [{"role": "user", "content": [inside]}]},
        {"messages": [{"role": "user", "content": "word " * 9000}]},
    ]
    found = [(chat, json.dumps(body).encode()) for body in bodies]
    return [
        *found,
        (chat, b"{"),
        (chat, b"\xff\xfe\x00"),
        (chat, b"[" * 100_000),
        (chat, b'{"messages": NaN}'),
        (chat, b'{"messages": "' + b"x" * 5_000_000 + b'"}'),
        ("/v1/completions", b'{"prompt": [[1, 2], [99999999]]}'),
        ("/v1/completions", b'{"prompt": []}'),
        ("/v1/embeddings", b'{"input": 7}'),
        ("/v1/messages", b'{"messages": [{"role": "user", "content": 5}]}'),
        ("/api/chat", b'{"model": "load", "messages": 3}'),
        ("/v1/responses", b'{"input": [{"type": "nothing"}]}'),
        ("/no/such/path", b"{}"),
    ]


# ---- measuring


async def rate(api: httpx.AsyncClient, streams: int, tokens: int, streaming: bool) -> float:
    """Tokens a second of so many replies at a time."""

    async def one(i: int) -> None:
        body = {"prompt": f"stream {i}", "max_tokens": tokens, "ignore_eos": True}
        body |= {"temperature": 0, "stream": streaming}
        reply = await api.post("/v1/completions", json=body)
        reply.raise_for_status()

    begun = time.monotonic()
    await asyncio.gather(*(one(i) for i in range(streams)))
    return streams * tokens / (time.monotonic() - begun)


async def rates(api: httpx.AsyncClient, tokens: int, rounds: int) -> dict[str, float]:
    """Medians, 1 and 8 taken in turn so that other load falls on both alike."""
    found: dict[str, list[float]] = defaultdict(list)
    await rate(api, 8, 16, False)
    for _ in range(rounds):
        for streams in (1, 8):
            found[f"whole_{streams}"].append(await rate(api, streams, tokens, False))
            found[f"streamed_{streams}"].append(await rate(api, streams, tokens, True))
    middle = {name: statistics.median(values) for name, values in found.items()}
    for name in ("whole", "streamed"):
        middle[f"{name}_speedup"] = middle[f"{name}_8"] / middle[f"{name}_1"]
    return {name: round(value, 2) for name, value in middle.items()}


def tenths(shares: list[float]) -> list[int]:
    """How many calls ended in each tenth of the run: a stall of the server shows."""
    counts = Counter(min(9, int(10 * share)) for share in shares)
    return [counts[i] for i in range(10)]


def spread(values: list[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(values)
    at = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    cuts = {n: 1e3 * ordered[min(len(ordered) - 1, int(q * len(ordered)))] for n, q in at.items()}
    return {"count": len(ordered), **{n: round(v, 1) for n, v in cuts.items()}}


def memory(samples: list[tuple[float, float]]) -> dict[str, float]:
    """MiB; the slope by least squares over the last three quarters, when everything is warm."""
    size = len(samples)
    warm, last = samples[size // 4 : size // 2], samples[-max(1, size // 4) :]
    before, after = (statistics.mean(m for _, m in part) for part in (warm or samples, last))
    rest = samples[size // 4 :]
    slope = statistics.linear_regression(*zip(*rest, strict=True)).slope if len(rest) > 1 else 0.0
    return {
        "first": round(samples[0][1], 1),
        "most": round(max(m for _, m in samples), 1),
        "second_quarter": round(before, 1),
        "last_quarter": round(after, 1),
        "slope_per_minute": round(60 * slope, 2),
    }


async def run(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as one report."""
    limits = httpx.Limits(max_connections=2 * args.clients, max_keepalive_connections=args.clients)
    async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=None) as api:
        throughput = await rates(api, args.tokens, args.rounds)
        load = Load(server, api)
        load.expected = [await load.continued(i) for i in range(REPEATS)]
        names = args.kinds or list(load.kinds)
        samples: list[tuple[float, float]] = []
        begun = time.monotonic()
        until = begun + args.seconds

        async def watch() -> None:
            while True:
                samples.append((time.monotonic() - begun, server.resident()))
                await asyncio.sleep(min(1.0, args.seconds / 40))

        watching = asyncio.create_task(watch())
        with hogs(args.hogs):
            await asyncio.gather(
                *(load.client(i, args.seed, until, names) for i in range(args.clients))
            )
        took = time.monotonic() - begun
        watching.cancel()
        left = None
        for _ in range(50):  # the last to hang up are noticed within a step
            left = await asyncio.to_thread(server.status)
            if left["queue"]["open"] == 0:
                break
            await asyncio.sleep(0.1)
    assert left is not None
    return {
        "clients": args.clients,
        "hogs": args.hogs,
        "seconds": round(took, 1),
        "calls": sum(load.counts.values()),
        "by_kind": dict(load.counts),
        "calls_by_tenth": tenths([(end - begun) / took for end in load.ended]),
        "faults": dict(load.faults),
        "latency_ms": {name: spread(values) for name, values in sorted(load.took.items())},
        "first_piece_ms": spread(load.first) if load.first else None,
        "memory_mib": memory(samples),
        "tokens_per_second": throughput,
        "new_tokens": left["engine"]["new_tokens"],
        "preemptions": left["engine"]["preemptions"],
        "open_at_end": left["queue"]["open"],
        "cache_used_at_end": left["memory"]["cache_used_bytes"],
    }


def missed(report: dict[str, Any]) -> list[str]:
    """The bars that were missed, in words."""
    found = [f"{count} x {fault}" for fault, count in report["faults"].items()]
    grown = report["memory_mib"]["last_quarter"] / report["memory_mib"]["second_quarter"] - 1
    if grown > GROWTH:
        found.append(f"memory grew by {grown:.1%}, at most {GROWTH:.0%}")
    for kind in ("chat", "stream", "schema"):
        row = report["latency_ms"].get(kind)
        if row and row["p99"] > FAIR * row["p50"]:
            found.append(
                f"{kind}: p99 {row['p99']} ms is more than {FAIR:g} medians of {row['p50']}"
            )
    speedup = report["tokens_per_second"]["whole_speedup"]
    if speedup < SPEEDUP:
        found.append(f"8 replies at a time are {speedup} times as fast as one, asked {SPEEDUP}")
    for name in ("open_at_end", "cache_used_at_end"):
        if report[name]:
            found.append(f"{name} is {report[name]}")
    if report["exit_status"]:
        found.append(f"the server ended with status {report['exit_status']}")
    found += report["complaints"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--model", type=Path, help="model folder; default: a nano made on the spot")
    parser.add_argument(
        "--tokens", type=int, default=256, help="of each reply when rates are taken"
    )
    parser.add_argument("--kinds", nargs="+", help="only these; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", default="32M", help="for the server's keys and values")
    parser.add_argument("--hogs", type=int, default=0, help="processes that use a core each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = args.model or Path(place) / "nano"
        if args.model is None:
            make_model(folder)
        server = Server(folder, ["--memory", args.memory, "--max-body", "4M"])
        try:
            report = asyncio.run(run(server, args))
        finally:
            status = server.stop()
    report |= {"exit_status": status, "complaints": server.complaints[:20]}
    report["missed"] = missed(report)
    print(json.dumps(report, indent=1))
    sys.exit(bool(report["missed"]))


if __name__ == "__main__":
    main()
