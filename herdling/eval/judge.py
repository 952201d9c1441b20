"""How hard is an example? Asked of a model, in words or by what it can do, or of an endpoint.

    judge = open_judge("runs/base/model")            # asked in words
    judge = open_judge("loss:runs/base/model")       # the loss of the answer: what is expected is easy
    judge = open_judge("pass:runs/base/model")       # the share of sampled replies that are not the answer
    judge = open_judge("https://host/v1#model")      # any OpenAI-compatible endpoint, key in OPENAI_API_KEY
    judge = open_judge("random")                     # drawn by lot: what the others must beat
    judge.rate(examples)                             # higher is harder, None where it gave no verdict

A model of a few million parameters does not understand the question in words; its loss and its pass
rate still say what is hard for it. Pictures are shown to models of ours, not to endpoints. The loss
and the pass rate look at the last answer of a conversation, which has one question before it or many.
"""

import math
import os
import random
import re
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any, Protocol
from urllib.parse import urlsplit

from herdling.data.sources import Example
from herdling.errors import ConfigError, Error, InputError, require
from herdling.eval.likelihood import example_losses
from herdling.infer.lm import LM, load
from herdling.infer.request import Request
from herdling.infer.sampling import Sampling
from herdling.inputs.tokenizer import Tokenizer
from herdling.tasks.base import normalise

QUESTION = (
    "Below is a task with its answer, from the training data of an assistant. How hard is it to give "
    "this answer? Easy means that a small model gets it right, hard that most models get it wrong. "
    "Reply with one word: easy, medium or hard.\n\n{}"
)
_VERDICT = re.compile(r"\b(easy|medium|hard)\b")
_RATING = {"easy": 0.0, "medium": 0.5, "hard": 1.0}
_MOST_CHARACTERS = 8000
_AT_ONCE = 8
_SECONDS = 60.0
_TRIES = 3
_PATIENCE = 300.0
"""Most seconds that one request waits because the endpoint limits its rate."""


class Judge(Protocol):
    """Rates examples."""

    def rate(self, examples: Sequence[Example]) -> list[float | None]:
        """How hard each is: comparable among examples of one judge; None for no verdict."""
        ...


def open_judge(spec: str, tok: Tokenizer, seed: int = 0) -> Judge:
    """The judge that `spec` names; `tok` reads the examples' tokens.

    Raises ConfigError where it cannot be, and where a model's tokenizer is not the examples' own.
    """
    if spec.startswith(("http://", "https://")):
        url, _, model = spec.partition("#")
        return Endpoint(url, model, tok)
    if spec == "random":
        return RandomJudge(seed)
    kind, _, folder = spec.partition(":")
    kinds = {"loss": LossJudge, "pass": PassJudge}
    made = kinds.get(kind)
    lm = load(folder if made else spec)
    if made is None:
        return AskedJudge(lm, tok)
    if lm.tokenizer.specials != tok.specials or len(lm.tokenizer) != len(tok):
        raise ConfigError(
            f"judge {spec}: its tokenizer is another than the examples'; remedy: ask it in words, "
            f"--judge {folder}"
        )
    return LossJudge(lm) if made is LossJudge else PassJudge(lm, seed=seed)


def verdict(reply: str) -> float | None:
    """0 for easy to 1 for hard, by the first of the words in a reply; None without one."""
    found = _VERDICT.search(reply.lower())
    return _RATING[found[1]] if found else None


def as_text(example: Example, tok: Tokenizer) -> str:
    """An example in words, a line a turn; each picture is `[image]`."""
    text = tok.decode(example.tokens)
    text = re.sub(r"<\|image_start\|>.*?<\|image_end\|>", "[image] ", text, flags=re.DOTALL)
    text = re.sub(r"<\|header_start\|>(.*?)<\|header_end\|>\s*", r"\n\1: ", text, flags=re.DOTALL)
    text = re.sub(r"<\|[^|>]*\|>", "", text).strip()
    if len(text) <= _MOST_CHARACTERS:
        return text
    half = _MOST_CHARACTERS // 2  # the answer, which is judged, stands at the end
    return f"{text[:half]} [...] {text[-half:]}"


class RandomJudge:
    """Draws lots: what is kept is then a part of the same size, which a judge must beat."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def rate(self, examples: Sequence[Example]) -> list[float | None]:
        return [random.Random(f"{self._seed}/{e.tokens}").random() for e in examples]


class LossJudge:
    """Hard is what the model finds unlikely: the mean loss of what is learnt from an example."""

    def __init__(self, lm: LM) -> None:
        self._lm = lm

    def rate(self, examples: Sequence[Example]) -> list[float | None]:
        # Where nothing is learnt but the end of the turn the loss is infinite, and nothing hard.
        losses = example_losses(self._lm, examples)
        return [loss if math.isfinite(loss) else None for loss in losses]


class PassJudge:
    """Hard is what the model gets wrong: the share of `tries` sampled replies that are not the answer."""

    def __init__(self, lm: LM, tries: int = 4, seed: int = 0) -> None:
        self._lm, self._tries, self._seed = lm, tries, seed

    def rate(self, examples: Sequence[Example]) -> list[float | None]:
        requests: list[Request] = []
        answers = []
        for example in examples:
            start = _last_answer(example)
            answer = example.tokens[start:]
            answers.append(normalise(_plain(answer, self._lm.tokenizer)))
            asked = Request(
                example.tokens[:start],
                example.tiles,
                max_tokens=2 * len(answer) + 4,
                stop_ids=tuple(self._lm.tokenizer.stop_ids),
                sampling=Sampling(temperature=1.0),
            )
            # By content, so that a rating does not depend on what else is rated with it.
            first = self._seed + zlib.crc32(str(example.tokens).encode()) * self._tries
            requests += [replace(asked, seed=first + k) for k in range(self._tries)]
        replies = [normalise(reply.text) for reply in self._lm.engine.run(requests)]
        groups = [replies[i : i + self._tries] for i in range(0, len(replies), self._tries)]
        return [
            1 - group.count(answer) / self._tries
            for group, answer in zip(groups, answers, strict=True)
        ]


def _last_answer(example: Example) -> int:
    """Where the last stretch of learnt tokens begins. Raises InputError where nothing is learnt."""
    mask = example.loss_mask
    end = next((i for i in range(len(mask) - 1, 0, -1) if mask[i]), 0)
    start = next((i + 1 for i in range(end, -1, -1) if not mask[i]), 0)
    if not 0 < start <= end:
        raise InputError(
            f"{example.domain}: an example without question and answer has no pass rate"
        )
    return start


def _plain(tokens: Sequence[int], tok: Tokenizer) -> str:
    control = set(tok.specials.values())
    return tok.decode([token for token in tokens if token not in control])


class AskedJudge:
    """A model of ours, asked in words."""

    def __init__(self, lm: LM, tok: Tokenizer) -> None:
        self._lm, self._tok = lm, tok

    def rate(self, examples: Sequence[Example]) -> list[float | None]:
        prompts = [
            self._lm.render([{"role": "user", "content": QUESTION.format(as_text(e, self._tok))}])
            for e in examples
        ]
        return [verdict(reply.text) for reply in self._lm.generate(prompts, max_tokens=16)]


class Endpoint:
    """A model behind an OpenAI-compatible API; `model` empty is the first that it lists."""

    def __init__(self, url: str, model: str, tok: Tokenizer) -> None:
        self._httpx = require("httpx", "judge")
        self._url, self._model, self._tok = url.rstrip("/"), model, tok
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query:
            raise ConfigError(
                f"judge {parts.hostname}: its address holds more than a host and a path, and runs "
                "record it; remedy: the key goes into OPENAI_API_KEY"
            )
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError("OPENAI_API_KEY holds a character that cannot be sent; remedy: a key")
        self._headers = {"Authorization": f"Bearer {self._key or 'none'}"}
        self._naming, self._given_up = threading.Lock(), threading.Event()

    def rate(self, examples: Sequence[Example]) -> list[float | None]:
        with (
            self._httpx.Client(headers=self._headers, timeout=_SECONDS) as client,
            ThreadPoolExecutor(_AT_ONCE, "judge") as pool,
        ):
            self._given_up.clear()
            asked = [pool.submit(self._ask, client, example) for example in examples]
            try:
                for one in wait(asked, return_when=FIRST_EXCEPTION).done:
                    one.result()
                return [one.result() for one in asked]
            finally:  # after an error or Ctrl-C nobody waits or asks on
                self._given_up.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, client: Any, example: Example) -> float | None:
        content = QUESTION.format(as_text(example, self._tok))
        body = {
            "model": self._name(client),
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 16,
            "temperature": 0,
        }
        found = self._json(client, "POST", "/chat/completions", body)
        try:
            return verdict(found["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise Error(f"judge {self._url}: its reply has no choices[0].message.content") from None

    def _name(self, client: Any) -> str:
        with self._naming:
            if not self._model:
                listed = self._json(client, "GET", "/models", None)
                try:
                    self._model = listed["data"][0]["id"]
                except (KeyError, IndexError, TypeError):
                    raise ConfigError(
                        f"judge {self._url} lists no model; remedy: name one, {self._url}#MODEL"
                    ) from None
        return self._model

    def _json(self, client: Any, method: str, path: str, body: Any) -> Any:
        """One request, tried three times where the network or the server fails, and until its
        patience ends where the server says that there are too many."""
        problem, failed, limited, waited = "", 0, 0, 0.0
        while True:
            pause = 2.0**failed
            try:
                reply = client.request(method, self._url + path, json=body)
                if reply.status_code < 400:
                    return reply.json()
                problem = f"status {reply.status_code}: {reply.text}"
                if reply.status_code == 429:
                    limited += 1
                    pause = _seconds(reply.headers.get("retry-after", ""), 2.0 ** min(limited, 6))
                elif reply.status_code < 500:
                    break
                else:
                    failed += 1
            except (self._httpx.HTTPError, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
                failed += 1
            waited += pause
            if failed == _TRIES or waited > _PATIENCE or self._wait(pause):
                break
        if self._key:  # which some servers say when they refuse it
            problem = problem.replace(self._key, "***")
        problem = " ".join(problem.split())[:200]
        raise Error(
            f"judge {self._url}{path}: {problem}; remedy: check the address and OPENAI_API_KEY"
        )

    def _wait(self, seconds: float) -> bool:
        """Wait, unless all is given up; whether it is."""
        return self._given_up.wait(seconds)


def _seconds(given: str, otherwise: float) -> float:
    """What a Retry-After header asks for, at least one second; a date is not read."""
    try:
        return max(1.0, float(given))
    except ValueError:
        return otherwise
