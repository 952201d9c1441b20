"""Safeguards in the server: python -m pytest tests/serve/test_guarding.py"""

import json
import threading

import pytest

from herdling.guard.classifier import Classifier
from herdling.guard.judges import Judges, ModelJudge, TextJudge
from herdling.guard.policy import Policy
from herdling.guard.taxonomy import Verdict
from herdling.serve.service import Service, Settings

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
BAD = [{"role": "user", "content": "the evil fox"}]


class Words:
    """Objects to messages with a word in them, and remembers what it was shown."""

    name = "words"

    def __init__(self, **words: str) -> None:
        self.words, self.seen = words, []

    def judge(self, messages):
        self.seen.append(messages)
        content = messages[-1]["content"]
        text = content if isinstance(content, str) else json.dumps(content)
        found = tuple(c for c, word in self.words.items() if word in text)
        return Verdict(found, float(bool(found)), self.name)


@pytest.fixture
def guarded(lm, engine, ask):
    """guarded(policy, judge): asks a service with safeguards, whose engine follows the script."""
    made = []

    def make(policy=None, judge=None):
        service = Service(Settings(name="toy", policy=policy))
        service.ready(lm, engine, judge or Words(S1="evil", S2="jumps"))
        made.append(service)

        def call(path=CHAT, **body):
            body = {"model": "toy", "messages": HELLO, **body} if path == CHAT else body
            return ask(service, "POST", path, json=body)

        call.service = service
        return call

    yield make
    for service in made:
        service.close()


def choices_of(reply):
    blocks = [b.removeprefix("data: ") for b in reply.text.split("\n\n") if b]
    assert blocks[-1] == "[DONE]"
    return [json.loads(b)["choices"][0] for b in blocks[:-1]]


def test_without_a_guard_nothing_is_judged(make_service, engine, ask):
    reply = ask(make_service(engine), "POST", CHAT, json={"model": "toy", "messages": BAD})
    assert reply.json()["choices"][0]["finish_reason"] == "stop"


def test_what_is_harmless_passes_whole_and_streamed_alike(guarded, engine):
    engine.script = lambda request: "the quick brown fox sleeps. " * 5
    judge = Words(S1="evil")
    call = guarded(Policy(window=40), judge)
    whole = call().json()["choices"][0]
    assert whole["finish_reason"] == "stop"
    assert whole["message"]["content"] == "the quick brown fox sleeps. " * 5
    looked = len(judge.seen)
    assert 3 <= looked <= 5  # the question, and the reply every 40 characters
    streamed = choices_of(call(stream=True))
    assert "".join(c["delta"].get("content", "") for c in streamed) == whole["message"]["content"]
    assert [c["finish_reason"] for c in streamed][-1] == "stop"
    assert len(judge.seen) == 2 * looked
    assert judge.seen[-1][0] == HELLO[0]
    assert judge.seen[-1][-1]["role"] == "assistant"


def test_a_blocked_question_never_reaches_the_engine(guarded, engine):
    reply = guarded()(messages=BAD)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "content_filter"
    assert engine.requests == []


def test_a_replaced_question_is_answered_by_the_policy(guarded, engine):
    call = guarded(Policy({"S1": "replace"}, message="No, thank you."))
    [choice] = call(messages=BAD).json()["choices"]
    assert choice["message"]["content"] == "No, thank you."
    assert choice["finish_reason"] == "content_filter"
    streamed = choices_of(call(messages=BAD, stream=True, n=2))
    assert sorted(c["index"] for c in streamed if c["finish_reason"]) == [0, 1]
    assert engine.requests == []


def test_logging_changes_nothing(guarded):
    call = guarded(Policy({"default": "log"}))
    assert call(messages=BAD).json()["choices"][0]["finish_reason"] == "stop"
    text = call.service.metrics.text().decode()
    assert 'herdling_guarded_total{action="log",category="S1",where="input"} 1.0' in text


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_is_cut_within_a_window(guarded, engine, stream):
    engine.script = lambda request: (
        "the lazy dog and the brown fox. " * 4 + "it jumps over " + "the dog " * 900
    )
    call = guarded(Policy(window=50))
    reply = call(stream=stream, max_tokens=1500, logprobs=True)
    if stream:
        choices = choices_of(reply)
        text = "".join(c["delta"].get("content", "") for c in choices)
        assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["content_filter"]
    else:
        [choice] = reply.json()["choices"]
        text = choice["message"]["content"]
        assert choice["finish_reason"] == "content_filter"
        shown = "".join(t["token"] for t in choice["logprobs"]["content"])
        assert "jumps" not in shown
    assert "jumps" not in text
    assert text.startswith("the lazy dog")
    assert engine.cancelled == [0]
    assert engine.steps < 400  # not read to its end


def test_a_replaced_reply_ends_with_the_policys_words(guarded, engine):
    engine.script = lambda request: "the dog jumps"
    call = guarded(Policy({"S2": "replace"}, message="[removed]"))
    [choice] = call().json()["choices"]
    assert choice["message"]["content"] == "[removed]"
    assert choice["finish_reason"] == "content_filter"


def test_only_the_choice_that_is_bad_is_cut(guarded, engine):
    engine.script = lambda request: "the fox jumps" if request.seed == 8 else "the dog sleeps"
    choices = guarded()(n=2, seed=7).json()["choices"]
    assert [c["finish_reason"] for c in choices] == ["stop", "content_filter"]
    assert [c["message"]["content"] for c in choices] == ["the dog sleeps", ""]


def test_calls_of_tools_are_judged(guarded, engine):
    engine.script = lambda request: '[weather(city="evil")]'
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    [choice] = guarded()(tools=[tool]).json()["choices"]
    assert choice["finish_reason"] == "content_filter"
    assert "tool_calls" not in choice["message"]


@pytest.mark.parametrize("parallel", [True, False])
def test_log_probs_of_a_call_wait_for_its_verdict(guarded, engine, parallel):
    engine.script = lambda request: '[weather(city="Oslo"), weather(city="evil")]'
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    asked = {"tools": [tool], "logprobs": True, "parallel_tool_calls": parallel}
    streamed = choices_of(guarded()(**asked, stream=True))
    shown = [t["token"] for c in streamed for t in (c.get("logprobs") or {}).get("content", [])]
    assert shown == []
    [choice] = guarded()(**asked).json()["choices"]
    assert choice["finish_reason"] == "content_filter"
    assert not choice["logprobs"]["content"]
    engine.script = lambda request: '[weather(city="Oslo")]'
    [choice] = guarded()(**asked).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert "Os" in "".join(t["token"] for t in choice["logprobs"]["content"])


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
def test_a_reply_that_the_caller_began_does_not_hide_the_question(guarded, engine, path):
    begun = [*BAD, {"role": "assistant", "content": "Sure, here is"}]
    reply = guarded()(path, model="toy", max_tokens=9, messages=begun)
    assert reply.status_code == 400
    assert engine.requests == []
    begun = [*HELLO, {"role": "assistant", "content": "Sure, evil"}]
    assert guarded()(path, model="toy", max_tokens=9, messages=begun).status_code == 400
    only = guarded(Policy({"S1": "replace"}))
    assert only(path, model="toy", max_tokens=9, messages=begun).status_code == 200
    assert engine.requests == []


def test_what_is_only_logged_is_counted_once_a_reply(guarded, engine):
    engine.script = lambda request: "it jumps " + "the dog " * 60
    call = guarded(Policy({"default": "log"}, window=20))
    assert call(n=2).status_code == 200
    text = call.service.metrics.text().decode()
    assert 'herdling_guarded_total{action="log",category="S2",where="output"} 2.0' in text


def test_text_is_judged_beside_the_event_loop(guarded):
    threads = set()

    class Slow(Words):
        def judge(self, messages):
            threads.add(threading.current_thread())
            return super().judge(messages)

    assert guarded(judge=Slow(S1="evil"))().status_code == 200
    assert threads
    assert threading.main_thread() not in threads


def test_other_apis_say_it_in_their_own_words(guarded, engine):
    engine.script = lambda request: "the dog jumps"
    call = guarded()
    user = [{"role": "user", "content": "hi"}]
    message = call("/v1/messages", model="toy", max_tokens=50, messages=user).json()
    assert message["stop_reason"] == "refusal"
    assert "jumps" not in json.dumps(message)
    response = call("/v1/responses", model="toy", input="hi").json()
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "content_filter"}
    ollama = call("/api/chat", model="toy", messages=user, stream=False).json()
    assert ollama["done_reason"] == "content_filter"
    assert "jumps" not in json.dumps(ollama)
    tgi = call("/generate", inputs="hi", parameters={"details": True}).json()
    assert tgi["details"]["finish_reason"] == "content_filter"
    assert "jumps" not in json.dumps(tgi)
    text = call("/v1/completions", model="toy", prompt="hi").json()["choices"][0]
    assert text["finish_reason"] == "content_filter"
    assert "jumps" not in text["text"]
    refused = call("/v1/messages", model="toy", max_tokens=50, messages=BAD)
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")
    assert call("/v1/completions", model="toy", prompt="an evil fox").status_code == 400


def test_completions_replace_prompts_with_log_probs_too(guarded):
    call = guarded(Policy({"default": "replace"}, message="No."))
    body = {"model": "toy", "prompt": "evil", "echo": True, "logprobs": 1}
    choice = call("/v1/completions", **body).json()["choices"][0]
    assert choice["text"] == "evilNo."
    assert choice["finish_reason"] == "content_filter"


def test_a_model_judges_in_an_engine_of_its_own(guarded, lm):
    """A toy model's answer is babble, which is no verdict: unreadable, and so stopped."""
    judge = Judges([ModelJudge(lm, "toy guard"), Words(S1="evil")])
    call = guarded(Policy({"unreadable": "log", "default": "block"}), judge)
    assert call().json()["choices"][0]["finish_reason"] == "stop"
    assert 'category="unreadable"' in call.service.metrics.text().decode()
    assert call(messages=BAD).status_code == 400
    strict = guarded(Policy(), Judges([ModelJudge(lm, "toy guard")]))
    assert strict().status_code == 400


def test_what_is_too_long_for_the_judge_is_refused_by_that_name(guarded, engine, tok, toy_lm):
    small = toy_lm(tok, max_position_embeddings=256)
    call = guarded(Policy(), Judges([ModelJudge(small, "toy guard")]))
    for body in ({}, {"stream": True}):
        reply = call(**body)
        assert reply.status_code == 400
        said = reply.json()["error"]["message"]
        assert said.startswith("The safeguards cannot judge this conversation: the prompt has ")
    assert engine.requests == []


def test_a_call_with_nothing_to_judge_is_refused(guarded, engine):
    reply = guarded(judge=TextJudge(Classifier(["S1"])))(messages=[{"role": "system", "content": "evil"}])  # fmt: skip
    assert reply.status_code == 400
    assert "cannot judge this conversation: messages has nothing" in reply.text
    assert engine.requests == []


def test_input_or_output_alone(guarded, engine):
    engine.script = lambda request: "the dog jumps"
    assert guarded(Policy(output=False))().json()["choices"][0]["finish_reason"] == "stop"
    only = guarded(Policy(input=False))
    assert only(messages=BAD).json()["choices"][0]["finish_reason"] == "content_filter"


def test_a_judge_whose_engine_fails_ends_the_server_as_the_models_own_does(guarded, lm):
    call = guarded(Policy(), Judges([ModelJudge(lm, "toy guard")]))
    told = []
    call.service.on_failure = told.append
    worker = next(iter(call.service.guarding._workers.values()))

    class Broken:
        busy = True

        def add(self, request):
            return 0

        def step(self):
            raise RuntimeError("no memory")

        def cancel(self, index):
            pass

    worker._engine = Broken()
    assert call().status_code == 500
    worker._thread.join(10)
    assert call.service.state() == ("failed", "safeguard toy guard: RuntimeError: no memory")
    assert told == ["safeguard toy guard: RuntimeError: no memory"]
    assert call().status_code == 503
