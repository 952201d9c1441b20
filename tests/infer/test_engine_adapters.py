"""Requests with different adapters in the same steps, against models whose weights were merged.

python -m pytest tests/infer/test_engine_adapters.py
"""

import copy
from dataclasses import replace

import pytest
import torch

import herdling
from herdling import lora
from herdling.errors import CheckpointError, InputError
from herdling.infer.engine import Engine
from herdling.infer.lm import LM
from herdling.infer.request import Request
from herdling.lora import LoraConfig

EACH = {"a": ("all", "router"), "b": ("experts", "head", "*.layers.0.*"), "c": ("vision", "projector")}  # fmt: skip


def train(model, name: str, seed: int) -> None:
    """As training would leave it: an adapter far from zero, that nobody uses by default."""
    adapters = lora.attach(model, LoraConfig(r=4, alpha=8, targets=EACH[name]), name, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, factors in adapters.factors(name).values():
            factors.B.copy_(0.1 * torch.randn(factors.B.shape, generator=generator))
    adapters.default = None


@pytest.fixture(scope="module")
def models(lm):
    """(an LM with all adapters, merged twins by name, the plain one under None)."""
    served = LM(copy.deepcopy(lm.model), lm.tokenizer)
    merged: dict[str | None, LM] = {None: lm}
    for seed, name in enumerate(EACH, 1):
        train(served.model, name, seed)
        own = copy.deepcopy(served.model)
        lora.merge(own, name)
        merged[name] = LM(own, lm.tokenizer)
    return served, merged


def requests(lm: LM) -> list[Request]:
    """Twelve, of which each adapter and none gets three: text short and long, and a picture."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for i, name in enumerate([None, "a", "b", "c"] * 3):
        ids = torch.randint(3, 280, (3 + 17 * (i % 2),), generator=generator).tolist()
        tiles = None
        if i % 4 in (1, 3) or i == 4:
            vision = lm.config.vision
            tiles = torch.randn(1, 3, vision.image_size, vision.image_size, generator=generator)
            ids = [*ids, *[lm.config.image_token_index] * vision.tokens_per_tile, 7]
        made.append(Request(ids, tiles, max_tokens=9, adapter=name, top_logprobs=2, prompt_logprobs=1, want_experts=True))  # fmt: skip
    return made


def same(one, other) -> None:
    assert one.ids == other.ids
    torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=2e-4, rtol=0)  # fmt: skip
    assert torch.equal(one.experts, other.experts)
    for a, b in zip(one.prompt[1:], other.prompt[1:], strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=2e-4)


def test_each_reply_is_what_the_merged_model_gives(models):
    served, merged = models
    wanted = requests(served)
    together = served.engine.run(wanted)
    for request, reply in zip(wanted, together, strict=True):
        same(reply, merged[request.adapter].engine.run([replace(request, adapter=None)])[0])
        engine = Engine(served.model, served.tokenizer)
        same(reply, engine.run([request])[0])
    plain = merged[None].engine.run([replace(request, adapter=None) for request in wanted])
    changed = [
        sum(r.adapter == n and a.logprobs != pytest.approx(b.logprobs, abs=1e-2) for r, a, b in zip(wanted, together, plain, strict=True))
        for n in (None, *EACH)
    ]  # fmt: skip
    assert changed == [0, 3, 3, 3]


def test_prefixes_are_shared_within_an_adapter_only(models):
    served, merged = models
    ids = list(range(10, 50))
    engine = Engine(served.model, served.tokenizer)
    first = [engine.run([Request(ids, max_tokens=4, adapter=name)])[0] for name in (None, "a", "a")]
    assert [reply.cached_tokens > 0 for reply in first] == [False, False, True]
    assert first[1].ids == first[2].ids == merged["a"].engine.run([Request(ids, max_tokens=4)])[0].ids  # fmt: skip


def test_an_adapter_may_come_while_others_are_served(make_lm):
    lm = make_lm()
    request = Request(list(range(5, 25)), max_tokens=6)
    before = lm.engine.run([request])[0]
    train(lm.model, "b", 2)
    assert lm.engine.run([request])[0].ids == before.ids
    own = copy.deepcopy(lm.model)
    lora.merge(own, "b")
    expected = LM(own, lm.tokenizer).engine.run([request])[0]
    reply = lm.engine.run([replace(request, adapter="b")])[0]
    assert reply.ids == expected.ids
    assert reply.logprobs == pytest.approx(expected.logprobs, abs=2e-4)
    assert reply.logprobs != pytest.approx(before.logprobs, abs=1e-2)


def test_another_adapter_of_the_same_name_shares_no_prefix(make_lm):
    lm = make_lm()
    request = Request(list(range(5, 45)), max_tokens=6, adapter="b")
    replies = []
    for seed in (2, 3):
        train(lm.model, "b", seed)
        replies.append(lm.engine.run([request])[0])
        lora.of(lm.model).remove("b")
    assert [reply.cached_tokens for reply in replies] == [0, 0]
    assert replies[0].logprobs != pytest.approx(replies[1].logprobs, abs=1e-2)


def test_an_adapter_of_the_same_name_is_another_one_while_others_run(make_lm):
    lm = make_lm()
    train(lm.model, "b", 2)
    lm.engine.add(Request(list(range(100, 120)), max_tokens=100))  # keeps the engine busy
    request = Request(list(range(5, 70)), max_tokens=6, adapter="b")

    def reply():
        index = lm.engine.add(request)
        while True:
            for event in lm.engine.step():
                if event.index == index and event.completion:
                    return event.completion

    reply()
    lora.of(lm.model).remove("b")
    train(lm.model, "b", 3)
    again = reply()
    assert again.cached_tokens == 0
    same = Engine(lm.model, lm.tokenizer).run([request])[0]
    assert again.logprobs == pytest.approx(same.logprobs, abs=2e-4)
    assert reply().cached_tokens > 0


@pytest.mark.parametrize("another", [False, True])
def test_taking_an_adapter_off_ends_the_requests_that_use_it_and_no_other(make_lm, another):
    lm = make_lm()
    train(lm.model, "a", 1)
    train(lm.model, "b", 2)
    wanted = [Request(list(range(5, 25)), max_tokens=8, adapter=n) for n in ("a", "b", None)]
    alone = [Engine(lm.model, lm.tokenizer).run([request])[0] for request in wanted]
    engine = Engine(lm.model, lm.tokenizer, max_running=3)
    indices = [engine.add(request) for request in (*wanted, wanted[0])]  # the last one waits
    engine.step()
    engine.step()
    lora.of(lm.model).remove("a")
    if another:
        train(lm.model, "a", 7)
    ended = {}
    while engine.busy:
        ended |= {e.index: e for e in engine.step() if e.error is not None or e.completion}
    assert set(ended) == set(indices)
    for index in (indices[0], indices[3]):
        assert (
            str(ended[index].error) == "adapter 'a' was taken off while the request was under way"
        )
    for index, expected in zip(indices[1:3], alone[1:], strict=True):
        assert ended[index].completion.ids == expected.ids
    assert engine.stats().finished == 4
    assert engine.stats().pages_used == 0


def test_an_adapter_in_training_is_what_requests_without_a_name_get(make_lm):
    lm = make_lm()
    train(lm.model, "b", 2)
    request = Request(list(range(5, 45)), max_tokens=6)
    plain = lm.engine.run([request])[0]
    lora.of(lm.model).default = "b"
    reply = lm.engine.run([request])[0]  # of what is kept of the plain model nothing
    named = lm.engine.run([replace(request, adapter="b")])[0]
    assert (reply.cached_tokens, named.cached_tokens > 0) == (0, True)
    assert reply.ids == named.ids
    assert reply.logprobs == pytest.approx(named.logprobs, abs=2e-4)
    assert reply.logprobs != pytest.approx(plain.logprobs, abs=1e-2)


def test_unknown_names_are_refused_with_those_that_are_loaded(models):
    served, merged = models
    with pytest.raises(InputError, match="adapter 'd' is not loaded; there are: a, b, c"):
        served.engine.add(Request([1, 2], adapter="d"))
    with pytest.raises(InputError, match="adapter 'a' is not loaded; there are: none"):
        merged[None].generate(["x"], adapter="a")


def test_load_takes_adapters_by_name(make_lm, tmp_path):
    lm = make_lm()
    herdling.save(lm, tmp_path / "model")
    train(lm.model, "a", 1)
    lora.save(lm.model, tmp_path / "a", "a")
    loaded = herdling.load(tmp_path / "model", adapters={"first/v1.0": tmp_path / "a"})
    options = {"max_tokens": 8, "temperature": 0.0}
    replies = [
        loaded.generate(["the quick brown"], adapter="first/v1.0", **options)[0],
        lm.generate(["the quick brown"], adapter="a", **options)[0],
        loaded.generate(["the quick brown"], **options)[0],
    ]
    assert replies[0].ids == replies[1].ids != replies[2].ids
    message = loaded.chat([{"role": "user", "content": "Hi"}], adapter="first/v1.0", max_tokens=2)
    assert message["role"] == "assistant"
    with pytest.raises(CheckpointError, match="merge or unwrap it before saving"):
        herdling.save(loaded, tmp_path / "sum")
    lora.merge(loaded.model)
    herdling.save(loaded, tmp_path / "sum")
    assert herdling.load(tmp_path / "sum").generate(["the quick brown"], **options)[0].ids == replies[0].ids  # fmt: skip
