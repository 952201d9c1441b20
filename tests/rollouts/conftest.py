"""A toy model that sees pictures and writes any token, and games with scripted replies."""

from collections.abc import Callable, Sequence

import pytest
import torch

from herdling.infer.lm import LM
from herdling.infer.request import Completion, Event, Request
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.llama import decoder_of


@pytest.fixture(scope="session")
def tok() -> Tokenizer:
    return Tokenizer.train(["how many shapes are there? what is 12 + 30? calc(x= " * 4], 320)


@pytest.fixture(scope="session")
def make_lm(tok: Tokenizer, toy_lm: Callable[..., LM]) -> Callable[..., LM]:
    def make(vision: bool = True, **fields) -> LM:
        made = toy_lm(tok, vision, mute=False, **fields)
        with torch.no_grad():  # of the control tokens only those that end a turn can be drawn
            specials = [i for i in tok.specials.values() if i not in (*tok.stop_ids, tok.patch)]
            decoder_of(made.model).lm_head.weight[specials] = -1
        return made

    return make


@pytest.fixture(scope="session")
def lm(make_lm) -> LM:
    return make_lm()


class Scripted:
    """An engine whose replies are given: one list of texts a game, a text a turn, stop token and all."""

    def __init__(self, lm: LM, scripts: Sequence[Sequence[str]]) -> None:
        self.tok = lm.tokenizer
        self.scripts = [list(script) for script in scripts]
        self.requests: list[Request] = []
        self.games: dict[int, int] = {}
        self.waiting: list[int] = []

    def check(self, request: Request) -> None:
        pass

    def add(self, request: Request) -> int:
        index = len(self.requests)
        before = [i for i, r in enumerate(self.requests) if r.ids == request.ids[: len(r.ids)]]
        self.games[index] = self.games[before[-1]] if before else len(set(self.games.values()))
        self.requests.append(request)
        self.waiting.append(index)
        return index

    def step(self) -> list[Event]:
        index = self.waiting.pop(0)
        text = self.scripts[self.games[index]].pop(0)
        ids = [t for part in _parts(text, self.tok) for t in part]
        stopped = ids[-1] in self.tok.stop_ids
        reply = Completion(self.tok.decode(ids[:-1] if stopped else ids), ids,
                           "stop" if stopped else "length", len(self.requests[index].ids),
                           [-0.5] * len(ids))  # fmt: skip
        return [Event(index, ids[-1], -0.5, "", reply)]


def _parts(text: str, tok: Tokenizer) -> list[list[int]]:
    for name in ("<|eot|>", "<|eom|>"):
        if text.endswith(name):
            return [tok.encode(text.removesuffix(name)), [tok.special(name)]]
    return [tok.encode(text)]


@pytest.fixture
def scripted(monkeypatch) -> Callable[[LM, Sequence[Sequence[str]]], Scripted]:
    """scripted(lm, replies of each game): put such an engine into `lm`; the games' prompts must differ."""

    def put(lm: LM, scripts: Sequence[Sequence[str]]) -> Scripted:
        engine = Scripted(lm, scripts)
        monkeypatch.setattr(lm, "engine", engine)
        return engine

    return put
