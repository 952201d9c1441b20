"""Every path of the engine gives the tokens of the plain forward; stops, cancels, refuses."""

from contextlib import closing
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herdling.errors import ConfigError, Error, InputError
from herdling.infer import runner
from herdling.infer.engine import Engine
from herdling.infer.lm import LM
from herdling.infer.request import Request
from herdling.infer.sampling import Sampling
from herdling.inputs.images import Tiles, image_ids

NEW = 6


def prompt(lm: LM, length: int, seed: int = 0, images: tuple[tuple[int, int], ...] = ()) -> Request:
    """`length` ordinary tokens with images (rows, columns of tiles) spread among them."""
    tok, generator = lm.tokenizer, torch.Generator().manual_seed(100 * seed + length)
    words = torch.randint(0, 256, (length,), generator=generator).tolist()
    ids, tiles = [tok.bos, *words[1:]], []
    for n, (rows, columns) in enumerate(images):
        count = rows * columns + (rows * columns > 1)
        pixels = torch.randn(count, 3, 32, 32, generator=generator)
        assert lm.processor is not None
        block = image_ids(Tiles(pixels, rows, columns), tok, lm.processor.tokens_per_tile)
        at = 1 + n if length > 1 else 1
        ids = ids[:at] + block + ids[at:]
        tiles.append(pixels)
    return Request(ids, torch.cat(tiles) if tiles else None, max_tokens=NEW)


def assert_greedy(lm: LM, request: Request, ids: list[int]) -> None:
    """`ids` are what argmax of the plain forward gives, one after another, by a clear margin."""
    whole = torch.tensor([[*request.ids, *ids]])
    logits = lm.logits(whole, request.tiles)[0, len(request.ids) - 1 : -1]
    assert ids == logits.argmax(-1).tolist()
    best = logits.topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-4, "the toy has a near tie; choose another seed"


def mixed(lm: LM) -> list[Request]:
    """Text rows among image rows: one tile, a grid with its global tile, several images."""
    return [
        prompt(lm, 9),
        prompt(lm, 3, 1, ((1, 1),)),
        prompt(lm, 30, 2),
        prompt(lm, 5, 3, ((1, 2),)),
        prompt(lm, 1, 4),
        prompt(lm, 12, 5, ((1, 1), (2, 1))),
        prompt(lm, 9, 6),
    ]


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 25])
def test_alone(lm, length):
    request = replace(prompt(lm, length), max_tokens=2 * 8 + 3)  # across two chunk boundaries
    reply = lm.engine.run([request])[0]
    assert len(reply.ids) == 19
    assert reply.finish_reason == "length"
    assert reply.prompt_tokens == length
    assert_greedy(lm, request, reply.ids)


def test_alone_with_images(lm):
    for request in mixed(lm):
        assert_greedy(lm, request, lm.engine.run([request])[0].ids)


def test_text_only_model(make_lm):
    lm = make_lm(vision=False)
    requests = [prompt(lm, n, n) for n in (4, 17, 9)]
    for request, reply in zip(requests, lm.engine.run(requests), strict=True):
        assert_greedy(lm, request, reply.ids)


def test_batched_with_other_lengths(lm):
    requests = [replace(r, max_tokens=3 + 2 * i) for i, r in enumerate(mixed(lm))]
    replies = lm.engine.run(requests)
    for request, reply in zip(requests, replies, strict=True):
        assert len(reply.ids) == request.max_tokens
        assert_greedy(lm, request, reply.ids)
        alone = lm.engine.run([request])[0]
        assert reply.text == alone.text
        assert reply.logprobs == pytest.approx(alone.logprobs, abs=2e-5)


def test_batched_at_equal_lengths_needs_no_mask(lm, monkeypatch):
    requests = [prompt(lm, 11, seed) for seed in range(4)]
    masks = []
    monkeypatch.setattr(lm.engine._ready().runner._native, "fits", False)  # attention is torch's
    attend = runner.attend_last
    monkeypatch.setattr(
        runner, "attend_last", lambda q, k, v, seen: masks.append(seen) or attend(q, k, v, seen)
    )
    for request, reply in zip(requests, lm.engine.run(requests), strict=True):
        assert_greedy(lm, request, reply.ids)
    assert len(masks) == (NEW - 1) * lm.config.text.num_hidden_layers
    assert all(seen is None for seen in masks)


@settings(max_examples=25, deadline=None)
@given(piece=st.integers(1, 60), rows=st.lists(st.integers(0, 6), min_size=1, max_size=7))
def test_prefill_at_any_split(plain_lm, piece, rows):
    lm = plain_lm
    requests = [mixed(lm)[i] for i in rows]
    engine = Engine(lm.model, lm.tokenizer, step_tokens=piece)
    whole = lm.engine.run(requests)
    for request, got, want in zip(requests, engine.run(requests), whole, strict=True):
        assert got.ids == want.ids
        assert got.logprobs == pytest.approx(want.logprobs, abs=2e-5)
        assert_greedy(lm, request, got.ids)


@pytest.mark.parametrize("limits", [dict(max_running=1), dict(max_running=3), dict(reuse=False)])
def test_limits_change_no_reply(lm, limits):
    requests = mixed(lm)
    engine = Engine(lm.model, lm.tokenizer, **limits)
    assert [r.ids for r in engine.run(requests)] == [r.ids for r in lm.engine.run(requests)]


def test_tiles_are_encoded_once_and_in_bounded_numbers(plain_lm, monkeypatch):
    sizes = []
    forward = type(plain_lm.model.vision_model).forward
    monkeypatch.setattr(
        type(plain_lm.model.vision_model),
        "forward",
        lambda self, x: sizes.append(len(x)) or forward(self, x),
    )
    monkeypatch.setattr(runner, "ENCODER_TOKENS", 2 * 65)
    requests = mixed(plain_lm)
    Engine(plain_lm.model, plain_lm.tokenizer, step_tokens=7).run(requests)
    assert sum(sizes) == sum(len(r.tiles) for r in requests if r.tiles is not None)
    assert max(sizes) == 2


def test_bfloat16_runs_and_stays_near(make_lm):
    lm = make_lm()
    requests = mixed(lm)
    want = lm.engine.run(requests)
    lm.model.bfloat16()
    for got, full in zip(lm.engine.run(requests), want, strict=True):
        assert got.logprobs[0] == pytest.approx(full.logprobs[0], abs=0.3)


# ---- sampling


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(lm):
    settings = Sampling(temperature=1.0, top_p=0.95)
    requests = [
        replace(r, sampling=settings, seed=i, max_tokens=10) for i, r in enumerate(mixed(lm))
    ]
    together = lm.engine.run(requests)
    for request, reply in zip(requests, together, strict=True):
        assert lm.engine.run([request])[0].ids == reply.ids
    backwards = lm.engine.run(requests[::-1])[::-1]
    assert [r.ids for r in backwards] == [r.ids for r in together]


def test_seeds_tell_equal_prompts_apart(plain_lm):
    hot = replace(prompt(plain_lm, 9), sampling=Sampling(temperature=2.0), max_tokens=8)
    replies = plain_lm.engine.run([replace(hot, seed=s) for s in (1, 2, 1)])
    assert replies[0].ids == replies[2].ids != replies[1].ids
    fresh = plain_lm.engine.run([replace(hot, seed=None)] * 8)
    assert len({tuple(r.ids) for r in fresh}) > 1


def test_greedy_and_sampled_rows_share_a_batch(plain_lm):
    hot = Sampling(temperature=2.0)
    requests = [replace(r, sampling=hot) if i % 2 else r for i, r in enumerate(mixed(plain_lm))]
    for request, reply in zip(requests, plain_lm.engine.run(requests), strict=True):
        if request.sampling.temperature == 0:
            assert_greedy(plain_lm, request, reply.ids)
        raw = plain_lm.logits([[*request.ids, *reply.ids[:1]]], request.tiles)[0, -2].log_softmax(0)
        assert reply.logprobs[0] == pytest.approx(raw[reply.ids[0]].item(), abs=1e-4)


def test_repetition_penalty_is_seen_by_greedy(plain_lm):
    request = replace(prompt(plain_lm, 9), max_tokens=30)
    free = plain_lm.engine.run([request])[0].ids
    held = replace(request, sampling=Sampling(repetition_penalty=1e6))
    ids = plain_lm.engine.run([held])[0].ids
    assert len(set(free)) < 30
    assert len({*ids}) == 30
    assert not set(ids) & set(request.ids)


# ---- the end of a reply


def test_stop_tokens_end_a_reply_and_are_not_text(plain_lm):
    request = replace(prompt(plain_lm, 9), max_tokens=12)
    ids = plain_lm.engine.run([request])[0].ids
    end = next(i for i in range(3, 12) if ids[i] not in ids[:i])
    reply = plain_lm.engine.run([replace(request, stop_ids=(ids[end],))])[0]
    assert reply.finish_reason == "stop"
    assert reply.ids == ids[: end + 1]
    assert len(reply.logprobs) == end + 1
    assert reply.text == plain_lm.tokenizer.decode(ids[:end], surrogates=False)


def test_stop_strings_across_token_boundaries(plain_lm):
    request = replace(prompt(plain_lm, 9), max_tokens=12)
    free = plain_lm.engine.run([request])[0]
    tok = plain_lm.tokenizer
    first, second = (len(tok.decode(free.ids[:n], surrogates=False)) for n in (4, 6))
    stop = free.text[first - 1 : second + 1]
    assert len(stop) >= 3
    at = free.text.index(stop)
    reply = plain_lm.engine.run([replace(request, stop=("never in it", stop))])[0]
    assert reply.text == free.text[:at]
    assert reply.finish_reason == "stop"
    assert reply.ids == free.ids[: len(reply.ids)]
    assert len(reply.ids) < 12


def test_events_add_up_to_the_completions(plain_lm):
    requests = [replace(r, stop=("zq", "\ufffd\ufffd")) for r in mixed(plain_lm)]
    want = plain_lm.engine.run(requests)
    texts, ids = [""] * len(requests), [[] for _ in requests]
    done = {}
    for event in plain_lm.engine.stream(requests):
        assert event.index not in done
        texts[event.index] += event.text
        ids[event.index].append(event.token)
        if event.completion:
            done[event.index] = event.completion
    assert texts == [reply.text for reply in want]
    assert ids == [reply.ids for reply in want]
    for i, reply in enumerate(want):
        # Sums of a first run in a process may be in another order than those of a second.
        assert done[i].logprobs == pytest.approx(reply.logprobs, abs=1e-5)
        assert replace(done[i], logprobs=reply.logprobs) == reply


def test_closing_the_iterator_stops_the_model(plain_lm):
    engine = Engine(plain_lm.model, plain_lm.tokenizer)
    with closing(engine.stream([replace(prompt(plain_lm, 9), max_tokens=99)])) as events:
        for _ in range(3):
            next(events)
    assert engine.stats().steps == 3
    assert engine.stats().pages_used == 0
    assert not engine.busy
    assert next(events, None) is None
    assert torch.is_grad_enabled()


def test_the_models_longest_context_ends_a_reply(make_lm):
    lm = make_lm(max_position_embeddings=20)
    request = replace(prompt(lm, 15), max_tokens=50)
    reply = lm.engine.run([request])[0]
    assert len(reply.ids) == 5
    assert reply.finish_reason == "length"
    assert_greedy(lm, request, reply.ids)


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(ids=[]), InputError, "the prompt has no tokens"),
        (dict(ids=[1] * 256), InputError, "has 256 tokens; .* max_position_embeddings, 256"),
        (dict(ids=[1] * 9000), InputError, "has 9000 tokens"),
        (dict(ids=[1, 320]), InputError, r"token id 320 is outside the vocabulary, 0\.\.319"),
        (dict(ids=[-1, 3]), InputError, "token id -1 is outside"),
        (dict(max_tokens=-1), InputError, "max_tokens is -1"),
        (dict(stop=("x", "")), InputError, "stop holds an empty string"),
        (dict(seed=-1), ConfigError, "seed is -1"),
        (dict(tiles=torch.zeros(1, 3, 32, 32)), InputError, "has 0 patch tokens for 1 tiles of 16"),
        (dict(tiles=torch.zeros(0, 3, 8, 8)), InputError, r"shape \(0, 3, 8, 8\); .* \(n, 3, 32"),
    ],
)
def test_a_bad_request_is_refused_before_anything_runs(plain_lm, change, error, words):
    good = prompt(plain_lm, 4)
    with pytest.raises(error, match=words):
        plain_lm.engine.stream([replace(good, **change)])
    with pytest.raises(error, match=r"prompts\[1\]: .*" + words):
        plain_lm.engine.stream([good, replace(good, **change)])


def test_patch_tokens_without_tiles_are_refused(plain_lm):
    request = prompt(plain_lm, 4, images=((1, 1),))
    with pytest.raises(InputError, match="16 patch tokens for 0 tiles"):
        plain_lm.engine.run([replace(request, tiles=None)])


def test_images_for_a_text_model_are_refused(make_lm):
    lm = make_lm(vision=False)
    with pytest.raises(InputError, match="model is text-only"):
        lm.engine.run([replace(prompt(lm, 4), tiles=torch.zeros(1, 3, 32, 32))])


def test_no_requests_no_replies(plain_lm):
    assert plain_lm.engine.run([]) == []


def test_logits_that_are_not_finite_are_an_error(make_lm):
    lm = make_lm()
    with torch.no_grad():
        lm.model.language_model.model.norm.weight[0] = torch.nan
    for sampling in (Sampling(), Sampling(temperature=1.0, top_p=0.5)):
        with pytest.raises(Error, match="not finite after 0 new tokens"):
            lm.engine.run([replace(prompt(lm, 4), sampling=sampling)])


def test_options_reach_the_request(plain_lm):
    request = plain_lm.request(
        "x", temperature=0.5, logit_bias={7: 2.0}, top_logprobs=2, min_tokens=3, priority=4, stop="end"
    )  # fmt: skip
    assert request.sampling == Sampling(0.5, logit_bias=((7, 2.0),), min_tokens=3)
    assert (request.top_logprobs, request.priority, request.stop) == (2, 4, ("end",))
    assert request.stop_ids == tuple(plain_lm.tokenizer.stop_ids)
    assert plain_lm.request("x", stop_ids=()).stop_ids == ()
    with pytest.raises(TypeError, match="unknown option 'temprature'"):
        plain_lm.request("x", temprature=0.5)


def test_min_tokens_holds_stop_tokens_back(plain_lm):
    request = replace(prompt(plain_lm, 9), max_tokens=12)
    free = plain_lm.engine.run([request])[0].ids
    held = replace(request, stop_ids=(free[0],), sampling=Sampling(min_tokens=5))
    ids = plain_lm.engine.run([held])[0].ids
    assert free[0] not in ids[:5]
    assert ids != free


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            dict(sampling=Sampling(logit_bias={320: 1.0})),
            ConfigError,
            "logit_bias has token id 320",
        ),
        (dict(top_logprobs=101), InputError, "top_logprobs is 101; it must be 0 to 100"),
        (dict(prompt_logprobs=-1), InputError, "prompt_logprobs is -1"),
        (dict(adapter="none"), InputError, "adapter 'none' is not loaded"),
    ],
)
def test_options_that_do_not_fit_are_refused(plain_lm, change, error, words):
    with pytest.raises(error, match=words):
        plain_lm.engine.add(replace(prompt(plain_lm, 4), **change))
