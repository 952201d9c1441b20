"""A server that says what the page's tests want to see: scripted replies, slow ones, errors, absence.

    with FakeServer(policy) as server:      # server.url; server.bodies: what the page asked for
        server.delay = 0.2                  # seconds before each token
        server.hold = 30                    # replies wait there, however slow the page is; None: go on

The reply depends on a word in the last message (see `SCRIPT`). Shapes are those of the real server:
`herdling.serve.openai_chat`, `.status`, `.about`; test_real_server.py holds the page to that one.
"""

import contextlib
import hashlib
import json
import math
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import herdling

PAGE = Path(herdling.__file__).parent / "serve" / "page"
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css"}
TYPES[".svg"] = "image/svg+xml"
LAYERS, EXPERTS = [1, 3, 5, 7], 8

MARKDOWN = """\
A herd keeps its **young** in the middle. Here is a *short* guide with `code`, ~~errors~~ and
[a link](https://example.org/herds).

## Three rules

1. Count them:
   - every evening
   - [x] also in *rain*
2. Keep a list.

| Name | Age | Wool |
| :--- | ---: | :---: |
| Alma | 3 | white |
| Bruno | 11 | `a|b` |

```python
def count(herd: list[str]) -> int:
    # the young ones, too
    return sum(1 for animal in herd if animal != "dog")
```

> Slowly is the fastest way.
"""

HOSTILE = """\
<img src=x onerror="window.hacked=1"> <script>window.hacked=1</script>

[click](javascript:window.hacked=1) [data](data:text/html,hacked)
![picture](http://evil.invalid/pixel.png) <http://evil.invalid/"onmouseover="window.hacked=1>

```html"><img src=x onerror=window.hacked=1>
</code></pre><script>window.hacked=1</script>
```

| <svg onload=window.hacked=1> | b |
| --- | --- |
| <iframe src="javascript:window.hacked=1"> | d |
"""

SCRIPT = {
    "guide": MARKDOWN,
    "hostile": HOSTILE,
    "long": "\n\n".join(f"Paragraph {i} of a long reply that goes on." for i in range(60)),
    "count": " ".join(str(i) for i in range(1, 401)),
    "umlaut": "Grüße aus Köln: 🦙🦙 und ein €.",
    "colour": "I see a red square at the left and a blue circle beside it.",
}
CALL = {"name": "get_weather", "arguments": '{"city": "Oslo", "days": 2}'}


def tokens(text: str) -> list[str]:
    """Words with the space before them, and what stands between."""
    return re.findall(r" ?[^\W\d_]{1,6}|\d| ?[^\w\s]|\s", text)


def noise(*parts: object) -> float:
    """0..1, the same for the same parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4]) / 2**32


class FakeServer:
    """Threads on a port that stays the same between `stop` and `start`."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.delay = 0.0
        self.hold: int | None = None
        self.key: str | None = None
        self.loading = False
        self.vision = True
        self.bodies: list[dict[str, Any]] = []
        self.cancelled = 0
        self.polls = 0
        self.written = 0
        self._port = 0
        self._open: set[Any] = set()
        self.start()

    def start(self) -> None:
        handler = type("Handler", (_Handler,), {"fake": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._http.daemon_threads = True
        self._port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Gone at once, replies under way included."""
        self.hold = None
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):  # it has just been closed from the other side
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "FakeServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/"

    def status(self) -> dict[str, Any]:
        self.polls += 1
        turn = self.polls
        wave = [0.5 + 0.5 * math.sin(turn / 5 + i) for i in range(4)]
        tile = {"tile": 56, "max_tiles": 6} if self.vision else {"tile": None, "max_tiles": None}
        load = [
            [round((1000 + 40 * turn) * noise(layer, i) ** 2) for i in range(EXPERTS)]
            for layer in LAYERS
        ]
        return {
            "status": "loading" if self.loading else "ok",
            "reason": None,
            "name": "tiny",
            "names": ["tiny", "tiny-poet"],
            "version": herdling.__version__,
            "uptime_seconds": 4000 + turn,
            "model": None
            if self.loading
            else {
                "layers": 8, "moe_layers": LAYERS, "experts": EXPERTS, "experts_per_token": 1,
                "hidden_size": 256, "vocabulary": 4096, "context": 8192, "parameters": 5_310_720,
                "dtype": "float32", "device": "cpu", "vision": self.vision, **tile,
            },
            "engine": {
                "running": round(6 * wave[0]), "waiting": round(3 * wave[1] ** 3),
                "pages": 512, "pages_used": round(150 + 90 * wave[0]), "pages_cached": 130,
                "page_bytes": 65536, "prompt_tokens": 52000 + 300 * turn,
                "cached_tokens": 21000 + 140 * turn, "new_tokens": 18000 + 90 * turn,
                "steps": 15000 + 60 * turn, "preemptions": 2, "finished": 312 + turn,
                "drafted": 4000, "accepted": 2600, "expert_load": load,
            },
            "queue": {"open": 3, "waiting": round(3 * wave[1] ** 3), "limit": 256},
            "rates": {
                "prompt_tokens_per_second": 900 * wave[2] ** 2,
                "new_tokens_per_second": 60 + 80 * wave[0] + 12 * noise(turn),
            },
            "memory": {
                "resident_bytes": 612_000_000 + 3_000_000 * round(8 * wave[0]),
                "cache_bytes": 512 * 65536, "cache_used_bytes": 200 * 65536,
            },
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.fake._open.add(self.connection)

    def finish(self) -> None:
        self.fake._open.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path in ("/v1/models", "/herdling/status"):
            if self._may():
                names = ("tiny", "tiny-poet")
                models = {"object": "list", "data": [{"id": n, "object": "model"} for n in names]}
                self._json(200, models if path == "/v1/models" else self.fake.status())
            return
        file = PAGE / (path.lstrip("/") or "index.html")
        if file.parent != PAGE or not file.is_file():
            self._error(404, "There is nothing here")
            return
        headers = {"Content-Security-Policy": self.fake.policy, "Cache-Control": "no-cache"}
        self._send(200, file.read_bytes(), TYPES[file.suffix], headers)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions" or not self._may():
            return
        self.fake.bodies.append(body)
        said = _last_text(body)
        if self.fake.loading:
            self._error(503, "The model is still loading", {"Retry-After": "5"})
        elif "too long" in said:
            self._error(400, "the context length is 8192 tokens, but the prompt has 9001 tokens")
        elif "busy" in said:
            self._error(429, "256 requests are waiting already.", {"Retry-After": "7"})
        else:
            self._stream(body, said)

    def _may(self) -> bool:
        if self.fake.key and self.headers.get("Authorization") != f"Bearer {self.fake.key}":
            self._error(401, "No valid API key; send one as 'Authorization: Bearer KEY'")
            return False
        return True

    def _error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self._json(status, {"error": {"message": message, "type": "x", "code": None}}, headers)

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), "application/json", headers or {})

    def _send(self, status: int, data: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    # ---- replies

    def _stream(self, body: dict[str, Any], said: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for chunk in _chunks(body, said):
                if "break" in said and chunk.get("index") == 2:
                    self.close_connection = True
                    return
                time.sleep(self.fake.delay)
                while self.fake.hold is not None and chunk.get("index", -1) >= self.fake.hold:
                    time.sleep(0.005)
                self._piece(f"data: {json.dumps(chunk)}\n\n")
            self._piece("data: [DONE]\n\n")
            self._piece("")
        except ConnectionError:
            self.fake.cancelled += 1
            self.close_connection = True

    def _piece(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


def _last_text(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", "") for part in content)


def _reply(body: dict[str, Any], said: str) -> str:
    if body["messages"][-1]["role"] == "tool":
        return f"The tool says: {said}"
    chosen = [text for word, text in SCRIPT.items() if word in said]
    return chosen[0] if chosen else f"You said: {said}"


def _chunks(body: dict[str, Any], said: str) -> Any:
    """Chunks as `herdling.serve.openai_chat` makes them; `index` counts the tokens."""
    frame = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "tiny"}
    frame["usage"] = None

    def chunk(delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        extra = {k: more.pop(k) for k in ("herdling", "index") if k in more}
        return {**frame, **extra, "choices": [{**choice, **more}]}

    yield chunk({"role": "assistant", "content": ""})
    reply, finish, written = _reply(body, said), "stop", []
    if "weather" in said and body.get("tools"):
        yield from (chunk({"tool_calls": [c]}) for c in _call_pieces())
        reply, finish = "", "tool_calls"
    if "forbidden" in said:
        finish = "content_filter"
    if "pictures" in said:
        parts = [
            p for m in body["messages"] if isinstance(m["content"], list) for p in m["content"]
        ]
        reply = f"I was shown {sum(p['type'] == 'image_url' for p in parts)} pictures."
    for i, text in enumerate(tokens(reply)):
        written.append(text)
        logprobs = {"content": [_scored(i, text)]} if body.get("logprobs") else None
        yield chunk({"content": text}, index=i, logprobs=logprobs, **_before(body, i, written))
    more = {}
    if body.get("herdling", {}).get("experts"):
        rows = [{"token": i, "text": t, "experts": _route(i, t)} for i, t in enumerate(written)]
        end = {"token": 2, "text": "<|eot|>", "experts": None}
        more["herdling"] = {"prompt": [], "reply": [*rows, end]}
    yield chunk({}, finish_reason=finish, **more)
    usage = {"prompt_tokens": 40 + len(said), "completion_tokens": len(written) + 1}
    usage["prompt_tokens_details"] = {"cached_tokens": 16}  # pyright: ignore
    yield {**frame, "choices": [], "usage": usage}


def _before(body: dict[str, Any], i: int, written: list[str]) -> dict[str, Any]:
    """The experts of the token before, with each token, as the real server tells them."""
    if not body.get("herdling", {}).get("experts"):
        return {}
    known = _route(i - 1, written[i - 1]) if i else None
    return {
        "herdling": {"token": i, "text": written[i], "experts": None, "previous_experts": known}
    }


def _call_pieces() -> list[dict[str, Any]]:
    name = {"name": CALL["name"], "arguments": ""}
    cuts = [0, 7, 15, len(CALL["arguments"])]
    pieces = [CALL["arguments"][a:b] for a, b in pairwise(cuts)]
    head = {"index": 0, "id": "call_1", "type": "function", "function": name}
    return [head, *({"index": 0, "function": {"arguments": piece}} for piece in pieces)]


def _scored(i: int, text: str) -> dict[str, Any]:
    p = 1 - 0.85 * noise("p", i, text) ** 3
    others = [word for word in (" herd", " the", ".", " wool", " barn") if word != text][:4]
    shares = [(1 - p) * s for s in (0.5, 0.25, 0.12, 0.06)]
    top = sorted([(p, text), *zip(shares, others, strict=True)], reverse=True)

    def one(share: float, word: str) -> dict[str, Any]:
        logprob = max(-30.0, math.log(share) if share > 0 else -30.0)
        return {"token": word, "logprob": logprob, "bytes": list(word.encode())}

    return {**one(p, text), "top_logprobs": [one(share, word) for share, word in top]}


def _route(i: int, text: str) -> list[list[int]]:
    """One expert a layer: mostly the word's own, so that the strip shows a pattern."""
    return [
        [int(EXPERTS * noise(layer, text if noise(i, layer) < 0.7 else i)) % EXPERTS]
        for layer in LAYERS
    ]
