"""Who judges: the small classifier on text, or a model of Llama Guard's kind on text and pictures.

    judge = open_judge("runs/guard")        # a folder with guard.json, or a model folder
    judge.judge(messages)                   # -> Verdict on the last message

A ModelJudge can also be asked in two halves, `request` and `verdict`, by those who run its engine
themselves and together with other calls (the server does).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from herdling.errors import InputError
from herdling.guard.classifier import ABOUT, Classifier, words
from herdling.guard.prompt import (
    ASKED,
    MOST_TOKENS,
    NOTHING,
    SPEAKERS,
    Message,
    answer,
    question,
    text_of,
)
from herdling.guard.taxonomy import Verdict, both

if TYPE_CHECKING:
    from herdling.infer.lm import LM
    from herdling.infer.request import Completion, Request

ALTERNATIVES = 20
"""Of the first token, among which those of both answers are looked for."""


class Judge(Protocol):
    """Anything that says whether the last message of a conversation is unsafe."""

    name: str

    def judge(self, messages: Sequence[Message]) -> Verdict: ...


class TextJudge:
    """The classifier, on what the last speaker said since the other side spoke."""

    def __init__(self, classifier: Classifier, name: str = "text") -> None:
        self.classifier, self.name = classifier, name

    def judge(self, messages: Sequence[Message]) -> Verdict:
        """Raises InputError where there is nothing to judge."""
        if not (said := latest(messages)):
            raise InputError(NOTHING)
        text = "\n".join(text_of(message) for message in said)
        if not words(text):  # a picture alone, which is not looked at
            return Verdict((), 0.0, self.name)
        scores = self.classifier.scores(text)
        found = sorted((c for c in scores if scores[c] >= self.classifier.threshold),
                       key=lambda c: -scores[c])  # fmt: skip
        return Verdict(tuple(found), max(scores.values()), self.name)


class ModelJudge:
    """A chat model tuned for the question in `prompt`, such as Llama Guard 4."""

    def __init__(
        self, lm: "LM", name: str = "model", categories: Mapping[str, str] = ASKED
    ) -> None:
        self.lm, self.name, self.categories = lm, name, categories
        tok = lm.tokenizer
        self._first = {word: tok.encode(word)[0] for word in ("safe", "unsafe")}

    def request(self, messages: Sequence[Message]) -> "Request":
        """What to ask the model's engine. Raises InputError where there is nothing to judge."""
        shown = messages if self.lm.processor is not None else [_unseen(m) for m in messages]
        return self.lm.request(
            self.lm.render(question(shown, self.categories)),
            max_tokens=MOST_TOKENS,
            temperature=0.0,
            top_logprobs=ALTERNATIVES,
        )

    def verdict(self, completion: "Completion") -> Verdict:
        """What its reply says; the score is P(unsafe) among its two first tokens, where they differ."""
        return answer(completion.text, self.categories, self._score(completion), self.name)

    def judge(self, messages: Sequence[Message]) -> Verdict:
        [completion] = self.lm.engine.run([self.request(messages)])
        return self.verdict(completion)

    def _score(self, completion: "Completion") -> float | None:
        safe, unsafe = self._first["safe"], self._first["unsafe"]
        if not completion.top or safe == unsafe:
            return None
        # The first line may begin with blank lines; the answer's token is the first that is either.
        for token, top in zip(completion.ids, completion.top, strict=False):
            if token in (safe, unsafe):
                found = {id: math.exp(logprob) for id, logprob in top if id in (safe, unsafe)}
                return found.get(unsafe, 0.0) / sum(found.values())
        return None


class Judges:
    """Several as one: what any of them objects to counts."""

    def __init__(self, judges: Sequence[Judge]) -> None:
        self.judges = list(judges)
        self.name = "+".join(judge.name for judge in judges)

    def judge(self, messages: Sequence[Message]) -> Verdict:
        return both(judge.judge(messages) for judge in self.judges)


def latest(messages: Sequence[Message]) -> list[Message]:
    """The last messages of one side: the assistant's, or those of users and tools."""
    shown = [m for m in messages if m.get("role") in SPEAKERS]
    start = len(shown)
    while start and (shown[start - 1]["role"] == "assistant") == (shown[-1]["role"] == "assistant"):
        start -= 1
    return shown[start:]


def _unseen(message: Message) -> Message:
    """The message with a word for each picture, for a judge that sees none."""
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return message
    picture = {"type": "text", "text": "[picture]"}
    kept = [part if part.get("type") == "text" else picture for part in content]
    return {**message, "content": kept}


def open_judge(path: str | Path, dtype: str | None = None, device: str | None = None) -> Judge:
    """The judge of a folder: a classifier if it holds guard.json, else a model. Raises CheckpointError."""
    folder = Path(path)
    name = folder.parent.name if folder.name == "model" else folder.name
    if (folder / ABOUT).is_file():
        return TextJudge(Classifier.open(folder), name)
    from herdling.infer.lm import load

    return ModelJudge(load(str(path), dtype, device), name)
