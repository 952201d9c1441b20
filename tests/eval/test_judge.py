"""Judges: what each looks at, what it is asked, and what happens when an endpoint misbehaves.

python -m pytest tests/eval/test_judge.py
"""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from herdling.data import embedded
from herdling.data.record_source import joined
from herdling.data.sources import Example
from herdling.errors import ConfigError, Error, InputError
from herdling.eval.judge import (
    AskedJudge,
    Endpoint,
    LossJudge,
    PassJudge,
    as_text,
    open_judge,
    verdict,
)
from herdling.infer.lm import LM
from herdling.inputs import chat
from herdling.inputs.tokenizer import Tokenizer
from herdling.recipes.start import start


@pytest.fixture(scope="module")
def lm(tmp_path_factory) -> LM:
    folder = tmp_path_factory.mktemp("tok")
    Tokenizer.train(embedded.texts(limit=200_000), 512, "compact").save(folder)
    begun = start("nano", folder, name="nano")
    return LM(begun.model, begun.tok, begun.processor)


def example(lm: LM, question: str, answer: str, *pictures: Image.Image) -> Example:
    parts = [{"type": "image", "image": p} for p in pictures] + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    made = chat.render(messages, lm.tokenizer, None, False, processor=lm.processor)
    return Example(made.ids, made.loss_mask, joined(made.tiles), "test")


@pytest.mark.parametrize(
    ("reply", "rating"),
    [("hard", 1.0), ("It is Easy.", 0.0), ("Medium, not hard", 0.5), ("uneasy", None), ("", None)],
)
def test_a_verdict_is_the_first_of_the_words(reply, rating):
    assert verdict(reply) == rating


def test_the_text_has_turns_and_no_control_tokens(lm):
    shown = example(lm, "How many?", "Three.", Image.new("RGB", (32, 32)))
    assert as_text(shown, lm.tokenizer) == "user: [image] How many?\nassistant: Three."


def test_a_long_example_keeps_its_answer(lm):
    text = as_text(example(lm, "Begin " + "word " * 3000, "Three."), lm.tokenizer)
    assert text.startswith("user: Begin word")
    assert text.endswith("word \nassistant: Three.")
    assert len(text) < 8100


def test_an_empty_reply_has_no_loss(lm):
    assert LossJudge(lm).rate([example(lm, "Say nothing.", "")]) == [None]


def test_the_loss_is_that_of_the_answer(lm):
    examples = [
        example(lm, "What is 2 + 2?", "4"),
        example(lm, "Say something long.", "A much longer answer than the other one."),
        example(lm, "Colour?", "red", Image.new("RGB", (32, 32), "red")),
    ]
    found = LossJudge(lm).rate(examples)
    for one, rating in zip(examples, found, strict=True):
        ids = torch.tensor([one.tokens])
        log_p = lm.logits(ids, one.tiles).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        control = set(lm.tokenizer.specials.values())
        learnt = torch.tensor(
            [m and t not in control for t, m in zip(one.tokens, one.loss_mask, strict=True)][1:]
        )
        assert rating == pytest.approx(-log_p[learnt].mean().item(), abs=1e-4)


def test_the_pass_rate_counts_replies_that_are_the_answer(lm, monkeypatch):
    asked: list[Any] = []

    def run(requests):
        asked.extend(requests)
        return [SimpleNamespace(text=t) for t in ("4", " 4. ", "5", "four", "7", "7", "7", "7")]

    monkeypatch.setattr(lm.engine, "run", run)
    one, two = example(lm, "2 + 2?", "4"), example(lm, "3 + 4?", "7")
    assert PassJudge(lm).rate([one, two]) == [0.5, 0.0]
    assert len({request.seed for request in asked}) == 8
    assert lm.tokenizer.decode(asked[0].ids).endswith("assistant<|header_end|>\n\n")
    first = [request.seed for request in asked[4:]]
    asked.clear()
    monkeypatch.setattr(
        lm.engine, "run", lambda r: asked.extend(r) or [SimpleNamespace(text="7")] * 4
    )
    PassJudge(lm).rate([two])  # alone: the same draws
    assert [request.seed for request in asked] == first


def test_a_document_has_no_pass_rate(lm):
    ids = [lm.tokenizer.bos, *lm.tokenizer.encode("text")]
    with pytest.raises(InputError, match="without question and answer"):
        PassJudge(lm).rate([Example(ids, [True] * len(ids), None, "text")])


def test_a_model_is_asked_in_words(lm, monkeypatch):
    asked: list[Any] = []

    def generate(prompts, **_):
        asked.extend(prompts)
        return [SimpleNamespace(text="hard"), SimpleNamespace(text="no idea")]

    monkeypatch.setattr(lm, "generate", generate)
    judge = AskedJudge(lm, lm.tokenizer)
    assert judge.rate([example(lm, "2 + 2?", "4")] * 2) == [1.0, None]
    assert "user: 2 + 2?\nassistant: 4" in lm.tokenizer.decode(asked[0].ids)


class Server:
    """An endpoint that says what it is told to: status, value, perhaps seconds to wait."""

    def __init__(self, replies: list[tuple[Any, ...]]) -> None:
        self.seen: list[tuple[str, str | None, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, body: Any) -> None:
                server.seen.append((self.path, self.headers.get("Authorization"), body))
                status, value, *after = replies.pop(0) if len(replies) > 1 else replies[0]
                text = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                for seconds in after:
                    self.send_header("Retry-After", seconds)
                self.end_headers()
                self.wfile.write(text)

            def do_GET(self) -> None:
                self.answer(None)

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    """What was waited; nothing is."""
    seconds: list[float] = []
    monkeypatch.setattr(Endpoint, "_wait", lambda _, pause: seconds.append(pause))
    return seconds


@pytest.fixture
def serve():
    made: list[Server] = []

    def start(*replies: tuple[Any, ...]) -> Server:
        made.append(Server(list(replies)))
        return made[-1]

    yield start
    for server in made:
        server.close()


def says(text: str) -> tuple[int, Any]:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def test_an_endpoint_is_asked_with_the_key(lm, serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    server = serve(says("Hard."))
    judge = open_judge(f"{server.url}#big", lm.tokenizer)
    assert judge.rate([example(lm, "2 + 2?", "4")] * 3) == [1.0] * 3
    path, key, body = server.seen[0]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer sesame", "big")
    assert "assistant: 4" in body["messages"][0]["content"]


def test_an_endpoint_names_its_model_and_is_tried_again(lm, serve, slept):
    server = serve((200, {"data": [{"id": "only"}]}), (503, {}), says("easy"))
    assert Endpoint(server.url, "", lm.tokenizer).rate([example(lm, "a", "b")]) == [0.0]
    assert [path for path, *_ in server.seen] == ["/v1/models", *["/v1/chat/completions"] * 2]
    assert server.seen[-1][2]["model"] == "only"
    assert slept == [1.0]


def test_an_endpoint_that_limits_its_rate_is_waited_for(lm, serve, slept):
    limits = [(429, {}, "20"), (429, {}, "7.5"), (429, {}, "0"), (429, {}), (429, {}, "Fri, 1 Jan")]
    server = serve(*limits, says("hard"))
    assert Endpoint(server.url, "m", lm.tokenizer).rate([example(lm, "a", "b")]) == [1.0]
    assert slept == [20.0, 7.5, 1.0, 16.0, 32.0]
    slept.clear()
    with pytest.raises(Error, match="status 429"):  # not for ever
        Endpoint(serve((429, {}, "100")).url, "m", lm.tokenizer).rate([example(lm, "a", "b")])
    assert slept == [100.0] * 3


def test_an_error_ends_the_waiting_of_the_others(lm, serve):
    limits = (429, {}, "200")
    server = serve(limits, (400, {}), limits)
    started = time.monotonic()
    with pytest.raises(Error, match="status 400"):
        Endpoint(server.url, "m", lm.tokenizer).rate([example(lm, "a", "b")] * 40)
    assert time.monotonic() - started < 60
    assert len(server.seen) < 40


def test_the_key_is_not_told(lm, serve, slept, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame\n")
    server = serve((401, {"error": "Incorrect key: sesame"}))
    with pytest.raises(Error, match=r"Incorrect key: \*\*\*") as problem:
        Endpoint(server.url, "m", lm.tokenizer).rate([example(lm, "a", "b")])
    assert "sesame" not in str(problem.value)
    assert server.seen[0][1] == "Bearer sesame"
    for address in ("https://me:sesame@host/v1", "https://host/v1?key=sesame"):
        with pytest.raises(ConfigError, match="judge host: its address holds more") as problem:
            open_judge(f"{address}#m", lm.tokenizer)
        assert "sesame" not in str(problem.value)
    monkeypatch.setenv("OPENAI_API_KEY", "s\u00e9same")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY holds a character that cannot be sent"):
        open_judge("https://host/v1#m", lm.tokenizer)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((401, {"error": "no"}), "status 401"),
        ((500, {}), "status 500"),
        ((200, {"x": 1}), "no choices"),
    ],
)
def test_an_endpoint_that_fails_is_one_line(lm, serve, slept, reply, message):
    server = serve(reply)
    with pytest.raises(Error, match=message):
        Endpoint(server.url, "m", lm.tokenizer).rate([example(lm, "a", "b")])
    assert len(server.seen) == (3 if reply[0] == 500 else 1)


def test_a_judge_reads_with_its_own_tokenizer(lm, tmp_path):
    import herdling

    herdling.save(lm, tmp_path / "model")
    other = Tokenizer.train(embedded.texts(limit=100_000), 400, "compact")
    with pytest.raises(ConfigError, match="another than the examples'"):
        open_judge(f"loss:{tmp_path / 'model'}", other)
    assert isinstance(open_judge(f"pass:{tmp_path / 'model'}", lm.tokenizer), PassJudge)
    assert isinstance(open_judge(str(tmp_path / "model"), other), AskedJudge)


def test_lots_are_fair_and_the_same_again(lm):
    examples = [example(lm, f"{i}?", str(i)) for i in range(50)]
    judge = open_judge("random", lm.tokenizer, seed=3)
    ratings = judge.rate(examples)
    assert ratings == judge.rate(examples[:10]) + judge.rate(examples[10:])
    assert len(set(ratings)) == 50
    assert ratings != open_judge("random", lm.tokenizer, seed=4).rate(examples)
