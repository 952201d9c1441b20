"""Coded keys and values: rounding, bytes, and the same replies whatever the schedule."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herdling.errors import ConfigError
from herdling.infer import kv_codes
from herdling.infer.drafts import OneByOne, Proposal
from herdling.infer.engine import Engine
from herdling.infer.kv_quant import SCHEMES, Layout, QuantStore
from herdling.infer.lm import LM
from herdling.infer.pages import Store
from herdling.infer.request import Event, Request
from herdling.infer.sampler import Sampler
from herdling.model import llama
from herdling.model.config import preset
from tests.infer.test_engine import prompt
from tests.infer.test_schedules import drafters, drain, pool

CPU = torch.device("cpu")


# ---- rounding


def coded(x: np.ndarray, bits: int, axis: int | tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """With codes symmetric about 0 over `axis`: the numbers again, and the steps."""
    top = 2 ** (bits - 1) - 1
    step = np.float16(np.abs(x).max(axis, keepdims=True) / top).astype(x.dtype)
    safe = np.where(step == 0, 1, step)
    return np.clip(np.round(x / safe), -top, top) * step, step


def coded_from_low(x: np.ndarray, bits: int, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """The same with an offset: codes from 0 on."""
    top = 2**bits - 1
    low = np.float16(x.min(axis, keepdims=True)).astype(x.dtype)
    step = np.float16(np.maximum(x.max(axis, keepdims=True) - low, 0) / top).astype(x.dtype)
    safe = np.where(step == 0, 1, step)
    return np.clip(np.round((x - low) / safe), 0, top) * step + low, step


def groups(x: np.ndarray) -> np.ndarray:
    return x.reshape(*x.shape[:-1], -1, kv_codes.group_of(x.shape[-1]))


@pytest.mark.parametrize("bits", kv_codes.BITS)
@pytest.mark.parametrize("d", [6, 32, 64, 96, 128])
def test_codes_of_tokens(bits, d):
    x = (
        torch.randn(37, 3, d, generator=torch.manual_seed(d))
        * torch.logspace(-3, 3, 37)[:, None, None]
    )
    x[5] = 0
    codes, scale = kv_codes.by_token(x, bits)
    assert codes.dtype == torch.uint8
    assert codes.shape == (37, 3, d * bits // 8)
    back = kv_codes.from_token(codes, scale, bits, torch.float32)
    want, step = coded(groups(x.double().numpy()), bits, -1)
    error = np.abs(groups(back.double().numpy()) - groups(x.double().numpy()))
    assert (error <= step * (0.5 + 2 ** (bits - 1) * 2.0**-11) + 1e-9).all()
    assert np.allclose(back.numpy().reshape(want.shape), want, rtol=1e-6)
    assert back[5].abs().max() == 0


@pytest.mark.parametrize("bits", kv_codes.BITS)
@pytest.mark.parametrize("tokens", [1, 16, 48])
def test_codes_of_channels(bits, tokens):
    generator = torch.manual_seed(tokens)
    x = torch.randn(5, tokens, 2, 32, generator=generator) + 20 * torch.randn(
        32, generator=generator
    )
    x[1, :, 0, 3] = 7.0
    codes, scale, low = kv_codes.by_channel(x, bits)
    back = kv_codes.from_channel(codes, scale, low, bits, torch.float32)
    want, step = coded_from_low(x.double().numpy(), bits, 1)
    error = np.abs((back - x).double().numpy())
    # What float16 loses of the offset is a part of the channel's size, not of its range.
    assert (error <= step / 2 + np.abs(x.numpy()).max(1, keepdims=True) * 2.0**-10).all()
    assert np.allclose(back.numpy(), want, rtol=1e-5, atol=1e-5)
    assert (back[1, :, 0, 3] == 7.0).all()


def test_every_code_survives_packing():
    for bits in kv_codes.BITS:
        top = 2 ** (bits - 1) - 1
        x = torch.arange(-top, top + 2.0).clamp(max=top).view(1, -1, 4 if bits == 4 else 16)
        x[..., 0] = top  # each head its own scale: all are 1
        codes, scale = kv_codes.by_token(x, bits)
        assert (scale == 1).all()
        assert torch.equal(kv_codes.from_token(codes, scale, bits, torch.float32), x)


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-6, 7e4, 1e9])
def test_numbers_beyond_float16_stay_finite(size):
    x = torch.full((2, 4, 1, 8), size)
    codes, scale = kv_codes.by_token(x[0], 4)
    assert kv_codes.from_token(codes, scale, 4, torch.float32).isfinite().all()
    codes, scale, low = kv_codes.by_channel(x, 4)
    assert kv_codes.from_channel(codes, scale, low, 4, torch.float32).isfinite().all()


# ---- bytes and places


def open_store(kv: str, pages: int = 12, **fields) -> QuantStore:
    config = preset("nano", vocab_size=320, **fields).text
    layout = Layout(config, kv)
    probe = QuantStore(config, 2**30, torch.float32, CPU, kv, 3, 4)
    budget = (pages + 1) * layout.page_bytes(torch.float32) + probe.tails.nbytes
    return QuantStore(config, budget, torch.float32, CPU, kv, 3, 4)


SHAPES = {
    "scout": dict(attention_chunk_size=8),
    "wide chunk": dict(attention_chunk_size=128),
    "no local layers": dict(attention_chunk_size=None),
    "no global layers": dict(attention_chunk_size=8, no_rope_layers=(1, 1, 1, 1)),
    "uneven": dict(attention_chunk_size=24, num_hidden_layers=5, no_rope_layers=(1, 1, 1, 0, 0)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kv", SCHEMES)
def test_no_position_lies_on_another(kv, shape):
    """All layers' positions of all pages are written; then all are read."""
    store = open_store(kv, **SHAPES[shape])
    layout, generator = store.layers, torch.manual_seed(1)
    config = preset("nano", vocab_size=320, **SHAPES[shape]).text
    heads = (config.num_key_value_heads, config.head_dim)
    pages = torch.arange(1, store.pages + 1)
    written = {}
    for layer, (local, _, _) in enumerate(layout.shares):
        mine = pages[::2] if local else pages[1::2]  # a page serves one kind at a time
        tokens = layout.local_tokens if local else layout.global_tokens
        stride = tokens * layout.share if local else tokens
        slots = (mine[:, None] * stride + torch.arange(tokens)).flatten()
        k, v = torch.randn(2, len(slots), *heads, generator=generator)
        if layout.formats[layer].by_channel:
            store.write_pages(layer, mine, k.view(len(mine), tokens, *heads))
            seen = store.write_values(layer, slots, v)
            step = (k.view(len(mine), tokens, *heads).amax(1) + 6).max() / 14
            written[layer] = slots, k, seen, step
        else:
            seen_k, seen = store.write(layer, slots, k, v)
            written[layer] = slots, seen_k, seen, 0.0
    for layer, (slots, k, v, step) in written.items():
        order = torch.randperm(len(slots), generator=generator)
        keys, values = store.read(layer, slots[order])
        assert torch.equal(values, v[order])
        assert (keys - k[order]).abs().max() <= step
        assert all((t == 0).all() for t in store.read(layer, torch.zeros(3, dtype=torch.int64)))


@pytest.mark.parametrize("kv", SCHEMES)
def test_bytes_are_those_of_the_tensors(kv):
    config = preset("nano", vocab_size=320, attention_chunk_size=8).text
    budget = 10**6 + 17
    store = QuantStore(config, budget, torch.float32, CPU, kv, 3, 4)
    held = {}
    for part in store._parts:
        for view in (part._key_codes, part._value_codes, part._key_scale, part._value_scale):
            held[view.untyped_storage().data_ptr()] = view.untyped_storage().nbytes()
    assert sum(held.values()) == (store.pages + 1) * store.page_bytes
    assert sum(held.values()) + store.tails.nbytes <= budget
    assert budget < sum(held.values()) + store.tails.nbytes + store.page_bytes
    rings = 3 * (store.layers.global_tokens + 4) * config.num_key_value_heads * config.head_dim
    assert store.tails.nbytes == 4 * rings  # one NoPE layer in float32


@pytest.mark.parametrize(("kv", "least"), [("int8", 1.8), ("mixed", 2.4), ("int4", 3.3)])
def test_smaller_than_bfloat16(kv, least):
    """Whichever kind a page is of, at the demo's narrow heads and at Scout's."""
    for fields in (
        dict(head_dim=32, num_attention_heads=6, num_key_value_heads=2, attention_chunk_size=128),
        dict(
            head_dim=128, num_attention_heads=40, num_key_value_heads=8, attention_chunk_size=8192
        ),
    ):
        config = preset("nano", vocab_size=320, **fields).text
        layout, plain = Layout(config, kv), Store(config, 10**8, torch.bfloat16, CPU)
        page = layout.page_bytes(torch.bfloat16)
        assert plain.page_bytes / page * layout.local_tokens / plain.layers.local_tokens >= least
        assert plain.page_bytes / page * layout.global_tokens / plain.layers.global_tokens >= least


def test_refusals(plain_lm):
    with pytest.raises(ConfigError, match="kv is 'int3'; use plain, int8, int4, mixed"):
        Engine(plain_lm.model, plain_lm.tokenizer, kv="int3")
    engine = Engine(plain_lm.model, plain_lm.tokenizer, kv="int4", memory=10_000)
    with pytest.raises(
        ConfigError, match=r"memory is 10000 bytes; .* for 64 running requests needs"
    ):
        engine.stats()


# ---- replies


def forward(lm: LM, request: Request, ids: list[int], kv: str) -> torch.Tensor:
    """Logits (T, V) of the plain forward in which keys and values go through codes.

    Each token sees what its position says it sees, by masks over all pairs.
    """
    layout = Layout(lm.config.text, kv)
    t, chunk = layout.global_tokens, lm.config.text.attention_chunk_size

    def through(x: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.from_numpy(
            coded(groups(x.float().numpy()), bits, -1)[0].reshape(x.shape)
        ).double()

    def attend(self, q, k, v, local, cache):
        form = SCHEMES[kv][not local]
        n, repeat = q.shape[1], q.shape[2] // k.shape[2]
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        page = torch.arange(n) // (chunk if local else t)
        same = page[:, None] == page
        if local:
            keys = own = through(k, form.key_bits)
            seen &= same
        else:
            keys, own = k.double().clone(), k.double()
            for a in range(0, n - t + 1, t):
                got, _ = coded_from_low(own[0, a : a + t].float().numpy(), form.key_bits, 0)
                keys[0, a : a + t] = torch.from_numpy(got)
        values = through(v, form.value_bits).repeat_interleave(repeat, 2)
        far, near = (
            torch.einsum("bqhd,bkhd->bhqk", q.double(), x.repeat_interleave(repeat, 2))
            for x in (keys, own)
        )
        scores = torch.where(same, near, far) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, values).to(q.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama.Layout, "attend", attend)
        return lm.logits([[*request.ids, *ids]], request.tiles)[0]


@pytest.fixture(scope="module")
def double_lm(make_lm: Callable[..., LM]) -> LM:
    """In float64, so that no difference between schedules comes near a step of the codes."""
    lm = make_lm()
    lm.model.double()
    return lm


def alone(lm: LM, request: Request, kv: str) -> list[int]:
    """The reply by a fresh engine in one piece; what the codes say it must be."""
    reply = Engine(lm.model, lm.tokenizer, kv=kv, reuse=False).run([request])[0]
    logits = forward(lm, request, reply.ids, kv)[len(request.ids) - 1 : -1]
    assert reply.ids == logits.argmax(-1).tolist()
    want = logits.log_softmax(-1).gather(1, torch.tensor(reply.ids)[:, None])[:, 0]
    assert reply.logprobs == pytest.approx(want.tolist(), abs=2e-5)
    return reply.ids


@pytest.fixture(scope="module")
def replies(double_lm) -> dict[str, list[list[int]]]:
    return {kv: [alone(double_lm, request, kv) for request in pool(double_lm)] for kv in SCHEMES}


@pytest.mark.parametrize("kv", SCHEMES)
@pytest.mark.parametrize("length", [1, 8, 23, 24, 25, 70])
def test_alone_over_many_pages(double_lm, kv, length):
    ids = alone(double_lm, replace(prompt(double_lm, length), max_tokens=60), kv)
    assert len(ids) == 60


def test_codes_are_what_makes_the_difference(double_lm, replies):
    """The tests here could not fail if all schemes said the same."""
    engine = Engine(double_lm.model, double_lm.tokenizer)
    plain = [reply.logprobs for reply in engine.run(pool(double_lm))]
    for kv in SCHEMES:
        engine = Engine(double_lm.model, double_lm.tokenizer, kv=kv)
        other = [reply.logprobs for reply in engine.run(pool(double_lm))]
        apart = [abs(a[0] - b[0]) for a, b in zip(plain, other, strict=True)]
        assert 1e-4 < max(apart) < 1


class Recital(OneByOne):
    """Guesses a reply that is known, with every `slip`th token wrong."""

    cost = 0.01

    def __init__(self, prompt: int, reply: list[int], slip: int) -> None:
        self._reply = [(t + (i % slip == slip - 1)) % 256 for i, t in enumerate(reply)]
        self._prompt = prompt

    def begin(self, ids: list[int]) -> "Recital.Guess":
        return self.Guess(self._reply, len(ids) - self._prompt)

    class Guess:
        nbytes = 0

        def __init__(self, reply: list[int], at: int) -> None:
            self._reply, self._at = reply, at

        def propose(self, count: int, sampler: Sampler) -> Proposal:
            return Proposal(self._reply[self._at : self._at + count])

        def commit(self, tokens: list[int]) -> None:
            self._at += len(tokens)


@pytest.mark.parametrize("kv", SCHEMES)
@pytest.mark.parametrize("slip", [2, 3, 5, 7])
def test_pages_filled_by_wrong_guesses(double_lm, kv, slip):
    """Guesses run over the ends of pages and are taken back, also into the page before."""
    lm, request = double_lm, replace(prompt(double_lm, 21), max_tokens=110)
    want = alone(lm, request, kv)
    engine = Engine(
        lm.model,
        lm.tokenizer,
        kv=kv,
        drafter=Recital(21, want, slip),
        longest_guess=8,
        max_running=2,
    )
    reply = engine.run([request])[0]
    assert reply.ids == want
    stats = engine.stats()
    assert stats.drafted > stats.accepted > 20
    # What it named for others is right.
    again = replace(request, ids=[*request.ids, *want[:90]], max_tokens=20)
    shared = engine.run([again])[0]
    assert shared.cached_tokens >= 72
    assert shared.ids == want[90:]


@pytest.mark.parametrize("kv", SCHEMES)
def test_a_prefix_is_shared_by_whole_pages(double_lm, replies, kv):
    engine = Engine(double_lm.model, double_lm.tokenizer, kv=kv)
    tokens = Layout(double_lm.config.text, kv).global_tokens
    long = pool(double_lm)[7]
    for cached in (0, (len(long.ids) - 1) // tokens * tokens):
        reply = engine.run([long])[0]
        assert (reply.cached_tokens, reply.ids) == (cached, replies[kv][7])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kv=st.sampled_from(list(SCHEMES)),
    arrivals=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 4)), min_size=1, max_size=12),
    step_tokens=st.integers(1, 40),
    pages=st.integers(14, 40),
    max_running=st.integers(1, 8),
    reuse=st.booleans(),
    drafter=st.sampled_from([None, "ngram", "shared", "oracle"]),
)
def test_any_schedule(
    double_lm, replies, kv, arrivals, step_tokens, pages, max_running, reuse, drafter
):
    lm, requests = double_lm, pool(double_lm)
    layout = Layout(lm.config.text, kv)
    pages += step_tokens // 8 + 2
    rings = max_running * (layout.global_tokens + 4) * 8 * layout.slot_size // 2
    engine = Engine(
        lm.model, lm.tokenizer, kv=kv, step_tokens=step_tokens, max_running=max_running,
        memory=(pages + 1) * layout.page_bytes(torch.float64) + rings, reuse=reuse,
        drafter=drafters(lm)[drafter], longest_guess=4,
    )  # fmt: skip
    events: dict[int, list[Event]] = {}
    which = {}
    for choice, wait in arrivals:
        which[engine.add(requests[choice])] = choice
        for _ in range(wait):
            drain(engine, events)
    while engine.busy:
        drain(engine, events)
    for index, choice in which.items():
        assert events[index][-1].completion.ids == replies[kv][choice]
    assert engine.stats().pages_used == 0
    store = engine._ready().runner.store
    assert isinstance(store, QuantStore)
    assert sorted(store.tails._free) == list(range(max_running))


def test_preempted_and_computed_again(double_lm):
    lm = double_lm
    requests = [replace(prompt(lm, 20, seed), max_tokens=130) for seed in range(3)]
    for kv in SCHEMES:
        size = Engine(lm.model, lm.tokenizer, kv=kv).stats().page_bytes
        layout = Layout(lm.config.text, kv)
        rings = 3 * layout.global_tokens * 8 * layout.slot_size // 2
        engine = Engine(
            lm.model, lm.tokenizer, kv=kv, memory=12 * size + rings, max_running=3, step_tokens=16
        )
        got = [reply.ids for reply in engine.run(requests)]
        assert engine.stats().preemptions > 0
        assert got == [alone(lm, request, kv) for request in requests]


@pytest.mark.parametrize("chunk", [None, 24])
def test_other_shapes(make_lm, chunk):
    """Without local layers; with chunks that are no power of two; with all layers local."""
    for layers in ((1, 1, 1, 0), (1, 0, 1, 0), (1, 1, 1, 1)):
        lm = make_lm(vision=False, attention_chunk_size=chunk, no_rope_layers=layers)
        lm.model.double()
        request = replace(prompt(lm, 30), max_tokens=70)
        engine = Engine(lm.model, lm.tokenizer, kv="mixed", step_tokens=11)
        whole = Engine(lm.model, lm.tokenizer, kv="mixed", reuse=False)
        assert engine.run([request])[0].ids == whole.run([request])[0].ids
        assert len({*engine.run([request])[0].ids}) > 3


def test_in_bfloat16(make_lm):
    lm = make_lm()
    requests = [replace(request, max_tokens=2) for request in pool(lm)[1:9:2]]
    want = [reply.logprobs[0] for reply in lm.engine.run(requests)]
    lm.model.bfloat16()
    engine = Engine(lm.model, lm.tokenizer, kv="mixed", step_tokens=33)
    got = [reply.logprobs[0] for reply in engine.run(requests)]
    assert got == pytest.approx(want, abs=0.8)
