"""Whatever the schedule, every reply is what its request alone would give, and no page is lost."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herdling.errors import ConfigError, InputError
from herdling.infer.draft_models import SharedExpertDraft
from herdling.infer.drafts import Drafter, NgramDraft, OneByOne, Proposal
from herdling.infer.engine import Engine
from herdling.infer.lm import LM
from herdling.infer.request import Event, Request
from herdling.infer.sampler import Sampler
from herdling.infer.sampling import Sampling
from tests.infer.test_engine import assert_greedy, mixed, prompt


def drain(engine: Engine, into: dict[int, list[Event]]) -> None:
    for event in engine.step():
        into.setdefault(event.index, []).append(event)


def pool(lm: LM) -> list[Request]:
    """Prompts of which several begin alike, some with images; replies across chunk boundaries."""
    long = prompt(lm, 45, 7)
    image = prompt(lm, 5, 3, ((1, 2),))
    other = replace(image, tiles=-image.tiles)
    return [
        *mixed(lm),
        long,
        replace(long, ids=[*long.ids[:40], 1, 2, 3]),
        replace(long, ids=long.ids[:24]),
        other,
        replace(long, max_tokens=21),
    ]


@pytest.fixture(scope="module")
def alone(plain_lm) -> list[list[int]]:
    engine = Engine(plain_lm.model, plain_lm.tokenizer, reuse=False)
    replies = [engine.run([request])[0].ids for request in pool(plain_lm)]
    for request, ids in zip(pool(plain_lm), replies, strict=True):
        assert_greedy(plain_lm, request, ids)
    return replies


def page_bytes(lm: LM) -> int:
    return Engine(lm.model, lm.tokenizer, memory=2**20).stats().page_bytes


class Oracle(OneByOne):
    """Guesses what the plain model would say, so that nearly all of it is accepted."""

    cost = 0.01

    def __init__(self, lm: LM) -> None:
        self.lm = lm

    def begin(self, ids: list[int]) -> "Oracle.Guess":
        return self.Guess(self.lm, list(ids))

    class Guess:
        nbytes = 0

        def __init__(self, lm: LM, ids: list[int]) -> None:
            self.lm, self.ids = lm, ids

        def propose(self, count: int, sampler: Sampler) -> Proposal:
            tokens: list[int] = []
            for _ in range(count):  # without images, so that prompts with one are guessed wrong
                row = self.lm.logits([[*self.ids, *tokens]])[0, -1]
                tokens.append(int(row.argmax()))
            return Proposal(tokens)

        def commit(self, tokens: list[int]) -> None:
            self.ids += tokens


def drafters(lm: LM) -> dict[str | None, Drafter | None]:
    shared = SharedExpertDraft(lm.model)
    return {None: None, "ngram": NgramDraft(shortest=1), "shared": shared, "oracle": Oracle(lm)}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=14),
    cancels=st.lists(st.tuples(st.integers(0, 13), st.integers(0, 12)), max_size=3),
    step_tokens=st.integers(1, 40),
    pages=st.integers(14, 40),
    max_running=st.integers(1, 8),
    reuse=st.booleans(),
    drafter=st.sampled_from([None, "ngram", "shared", "oracle"]),
    adapt=st.booleans(),
)  # fmt: skip
def test_any_schedule(
    plain_lm, alone, arrivals, cancels, step_tokens, pages, max_running, reuse, drafter, adapt
):
    lm, requests = plain_lm, pool(plain_lm)
    # Pieces longer than a chunk hold more local pages at once.
    pages += step_tokens // 8 + 2
    engine = Engine(
        lm.model, lm.tokenizer, memory=(pages + 1) * page_bytes(lm),
        step_tokens=step_tokens, max_running=max_running, reuse=reuse,
        drafter=drafters(lm)[drafter], longest_guess=4, adapt_guesses=adapt,
    )  # fmt: skip
    events: dict[int, list[Event]] = {}
    which, steps, gone = {}, 0, set()
    for n, (choice, wait, priority) in enumerate(arrivals):
        which[engine.add(replace(requests[choice], priority=priority))] = choice
        for _ in range(wait):
            drain(engine, events)
            steps += 1
        for index, at in cancels:
            if at <= n and index in which and index not in gone:
                engine.cancel(index)
                gone.add(index)
    for _ in range(3000):
        if not engine.busy:
            break
        drain(engine, events)
    assert not engine.busy
    for index, choice in which.items():
        seen = events[index]
        reply = seen[-1].completion
        assert reply is not None
        assert all(event.completion is None for event in seen[:-1])
        if reply.finish_reason == "cancelled":
            assert index in gone
            assert reply.ids == alone[choice][: len(reply.ids)]
        else:
            assert reply.ids == alone[choice]
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert stats.finished == len(which)


def test_a_prefix_is_computed_once(plain_lm, alone):
    engine = Engine(plain_lm.model, plain_lm.tokenizer)
    long = pool(plain_lm)[7]
    first, second = engine.run([long])[0], engine.run([long])[0]
    # 24 positions of all layers are a page here; the last token is always computed.
    assert (first.cached_tokens, second.cached_tokens) == (0, 24)
    assert first.ids == second.ids == alone[7]
    together = Engine(plain_lm.model, plain_lm.tokenizer).run([long] * 5)
    assert [reply.cached_tokens for reply in together] == [0, 24, 24, 24, 24]
    assert all(reply.ids == alone[7] for reply in together)


def test_equal_tokens_with_other_pixels_share_nothing_behind_them(plain_lm, alone):
    requests = pool(plain_lm)
    engine = Engine(plain_lm.model, plain_lm.tokenizer)
    image, other = requests[3], requests[10]
    assert image.ids == other.ids
    assert alone[3] != alone[10]
    assert len(image.ids) > 48
    for _ in range(2):
        assert engine.run([image])[0].ids == alone[3]
        assert engine.run([other])[0].ids == alone[10]
    assert engine.run([image])[0].cached_tokens == 48


def test_changed_weights_are_noticed(make_lm):
    lm = make_lm()
    request = pool(lm)[7]
    lm.engine.run([request])
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.manual_seed(1)))
    reply = lm.engine.run([request])[0]
    assert reply.cached_tokens == 0
    assert_greedy(lm, request, reply.ids)


def test_local_layers_hold_one_chunk(make_lm):
    """With all layers local, a reply needs the same few pages however long it is."""
    lm = make_lm(no_rope_layers=(1, 1, 1, 1))
    engine = Engine(lm.model, lm.tokenizer, reuse=False, step_tokens=8)
    used = set()
    engine.add(replace(prompt(lm, 30), max_tokens=60))
    while engine.busy:
        engine.step()
        used.add(engine.stats().pages_used)
    assert max(used) <= 1  # a chunk is 8 positions, and so is a page


def test_a_long_prompt_does_not_stall_others(plain_lm):
    engine = Engine(plain_lm.model, plain_lm.tokenizer, step_tokens=8)
    long = engine.add(replace(prompt(plain_lm, 200), max_tokens=2))
    engine.step()
    short = engine.add(replace(prompt(plain_lm, 6), max_tokens=5))
    gaps, steps, done = [], 0, []
    while engine.busy:
        steps += 1
        for event in engine.step():
            if event.index == short:
                gaps.append(steps)
            if event.completion:
                done.append(event.index)
    assert gaps == [2, 3, 4, 5, 6]  # half of each step, then a token in every one
    assert done == [short, long]


def test_whoever_comes_first_takes_pages_from_who_comes_later(plain_lm):
    """Two replies grow until only one fits: the later one waits, starts again, and is the same."""
    lm = plain_lm
    requests = [replace(prompt(lm, 20, seed), max_tokens=60) for seed in (1, 2)]
    engine = Engine(lm.model, lm.tokenizer, memory=9 * page_bytes(lm), step_tokens=16)
    which = [engine.add(replace(r, priority=-i)) for i, r in enumerate(requests)]
    events: dict[int, list[Event]] = {}
    ended = []
    while engine.busy:
        before = len(ended)
        drain(engine, events)
        ended += [
            i
            for i in which
            if i not in ended and events.get(i, [None])[-1] and events[i][-1].completion
        ]
        assert len(ended) - before <= 1
    assert engine.stats().preemptions > 0
    assert ended == which[::-1]
    for index, request in zip(which, requests, strict=True):
        assert_greedy(lm, request, events[index][-1].completion.ids)
        assert [event.token for event in events[index]] == events[index][-1].completion.ids


def test_memory_too_small_is_said_at_once(plain_lm):
    size = page_bytes(plain_lm)
    engine = Engine(plain_lm.model, plain_lm.tokenizer, memory=6 * size, step_tokens=8)
    with pytest.raises(InputError, match=r"need .* MiB of cache, .* MiB are there"):
        engine.add(replace(prompt(plain_lm, 9), max_tokens=200))
    with pytest.raises(ConfigError, match="memory is 10 bytes; the cache needs at least"):
        Engine(plain_lm.model, plain_lm.tokenizer, memory=10)


def test_memory_is_kept_while_many_run(plain_lm, alone):
    """Far more requests than fit: pages are never over-committed, and all replies come."""
    size = page_bytes(plain_lm)
    engine = Engine(plain_lm.model, plain_lm.tokenizer, memory=14 * size, step_tokens=16)
    which = {engine.add(r): i for _ in range(4) for i, r in enumerate(pool(plain_lm))}
    events: dict[int, list[Event]] = {}
    while engine.busy:
        drain(engine, events)
        assert engine.stats().pages_used <= 13
    for index, choice in which.items():
        assert events[index][-1].completion.ids == alone[choice]


def test_prompt_log_probs_are_those_of_the_plain_forward(plain_lm):
    lm = plain_lm
    request = replace(mixed(lm)[5], prompt_logprobs=2, max_tokens=0)
    wide = Engine(lm.model, lm.tokenizer)
    narrow = Engine(lm.model, lm.tokenizer, step_tokens=5)
    full = lm.logits([request.ids], request.tiles)[0].log_softmax(-1)
    for engine in (wide, narrow, wide):
        reply = engine.run([mixed(lm)[1], request])[1]
        assert (reply.ids, reply.finish_reason) == ([], "length")
        assert reply.prompt is not None
        assert reply.prompt[0] is None
        assert len(reply.prompt) == len(request.ids)
        for i, entry in enumerate(reply.prompt[1:]):
            assert entry is not None
            assert entry.token == request.ids[i + 1]
            assert entry.logprob == pytest.approx(full[i, entry.token].item(), abs=1e-4)
            values, ids = full[i].topk(2)
            assert [id for id, _ in entry.top] == ids.tolist()
            assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_alternatives_of_new_tokens(plain_lm):
    request = replace(prompt(plain_lm, 9), top_logprobs=3, sampling=Sampling(temperature=1.0))
    other = prompt(plain_lm, 5, 1)
    reply, plain = plain_lm.engine.run([request, other])
    assert plain.top == []
    whole = plain_lm.logits([[*request.ids, *reply.ids]])[0, 8:-1].log_softmax(-1)
    for row, top, own, logprob in zip(whole, reply.top, reply.ids, reply.logprobs, strict=True):
        values, ids = row.topk(3)
        assert [id for id, _ in top] == ids.tolist()
        assert [value for _, value in top] == pytest.approx(values.tolist(), abs=1e-4)
        assert logprob == pytest.approx(row[own].item(), abs=1e-4)


def test_experts_of_every_token(plain_lm):
    lm = plain_lm
    request = replace(mixed(lm)[3], want_experts=True)
    engine = Engine(lm.model, lm.tokenizer, step_tokens=7)
    reply = engine.run([mixed(lm)[2], request])[1]
    chosen = []
    routers = [layer.feed_forward.router for layer in lm.model.language_model.model.layers]
    hooks = [r.register_forward_hook(lambda _, __, out: chosen.append(out[0])) for r in routers]
    lm.logits([[*request.ids, *reply.ids[:-1]]], request.tiles)
    for hook in hooks:
        hook.remove()
    assert reply.experts is not None
    assert torch.equal(reply.experts.long(), torch.stack(chosen, 1))
    assert not any(r._forward_hooks for r in routers)
    load = torch.tensor(engine.stats().expert_load)
    assert load.shape == (len(routers), lm.config.text.num_local_experts)


def test_experts_of_a_shared_beginning_are_known_without_computing_it_again(plain_lm):
    lm = plain_lm
    request = replace(prompt(lm, 60), max_tokens=4, want_experts=True)
    alone = Engine(lm.model, lm.tokenizer, reuse=False).run([request])[0]
    engine = Engine(lm.model, lm.tokenizer)
    # Pages that a request without that wish left are computed again, the others are not.
    assert engine.run([replace(request, want_experts=False)])[0].cached_tokens == 0
    first, second = (engine.run([request])[0] for _ in range(2))
    assert (first.cached_tokens, second.cached_tokens) == (0, 48)
    together = Engine(lm.model, lm.tokenizer).run([request, request])
    assert together[1].cached_tokens == 48
    for reply in (first, second, *together):
        assert reply.ids == alone.ids
        assert torch.equal(reply.experts, alone.experts)
        assert reply.experts.shape[0] == len(request.ids) + len(reply.ids) - 1


def test_smaller_pages_share_more_and_change_nothing(plain_lm):
    lm = plain_lm
    request = replace(prompt(lm, 45), max_tokens=6, want_experts=True)
    for page, shared in ((8, 24), (4, 36), (2, 42)):
        engine = Engine(lm.model, lm.tokenizer, page=page)
        replies = engine.run([request] * 3)
        assert [reply.cached_tokens for reply in replies] == [0, shared, shared]
        assert [reply.ids for reply in replies] == [lm.engine.run([request])[0].ids] * 3
        assert torch.equal(replies[0].experts, replies[2].experts)
    with pytest.raises(ConfigError, match="page is 0"):
        Engine(lm.model, lm.tokenizer, page=0)


def test_experts_survive_being_put_back_into_the_queue(plain_lm):
    lm = plain_lm
    requests = [replace(prompt(lm, 20, i), max_tokens=60, want_experts=True) for i in (1, 2)]
    alone = [Engine(lm.model, lm.tokenizer).run([request])[0] for request in requests]
    for reuse in (True, False):
        engine = Engine(
            lm.model, lm.tokenizer, memory=9 * page_bytes(lm), step_tokens=16, reuse=reuse
        )
        replies = engine.run(requests)
        assert engine.stats().preemptions > 0
        assert engine.stats().prompt_tokens == sum(len(request.ids) for request in requests)
        for one, other in zip(alone, replies, strict=True):
            assert torch.equal(one.experts, other.experts)


def test_guesses_that_are_right_save_steps_and_change_nothing(plain_lm):
    """Across chunk boundaries, with pages named for others on the way."""
    lm = plain_lm
    request = replace(prompt(lm, 21), max_tokens=40, top_logprobs=2, want_experts=True)
    plain = Engine(lm.model, lm.tokenizer)
    want = plain.run([request])[0]
    engine = Engine(
        lm.model, lm.tokenizer, drafter=Oracle(lm), longest_guess=5, adapt_guesses=False
    )
    events = list(engine.stream([request]))
    got = events[-1].completion
    assert got is not None
    assert got.ids == want.ids == [event.token for event in events]
    assert got.logprobs == pytest.approx(want.logprobs, abs=2e-5)
    assert [[id for id, _ in top] for top in got.top] == [[id for id, _ in top] for top in want.top]
    assert torch.equal(got.experts, want.experts)
    stats = engine.stats()
    assert stats.accepted == stats.drafted > 25
    assert stats.steps < plain.stats().steps / 2
    # What it left for others was named rightly: a longer prompt shares it.
    again = replace(request, ids=[*request.ids, *want.ids[:35]], max_tokens=5, want_experts=False)
    reply = engine.run([again])[0]
    assert reply.cached_tokens == 48
    assert reply.ids == want.ids[35:]


@pytest.mark.parametrize("sampled", [False, True])
def test_a_seed_reproduces_with_guesses_whatever_else_runs(plain_lm, sampled):
    lm = plain_lm
    hot = Sampling(temperature=0.7)
    requests = [replace(r, sampling=hot, seed=i, max_tokens=12) for i, r in enumerate(mixed(lm))]

    def engine(**limits) -> Engine:
        # Lengths are part of what drafts that draw reproduce: no clock is asked for them by itself.
        drafter = SharedExpertDraft(lm.model, sampled=sampled)
        return Engine(lm.model, lm.tokenizer, drafter=drafter, adapt_guesses=sampled, **limits)

    alone = [engine().run([r])[0].ids for r in requests]
    together = engine(step_tokens=19, max_running=4)
    assert [reply.ids for reply in together.run(requests[::-1])][::-1] == alone
    assert together.stats().drafted > 0


def test_a_stop_inside_a_guess_ends_the_reply(plain_lm):
    lm = plain_lm
    request = replace(prompt(lm, 21), max_tokens=40)
    free = lm.engine.run([request])[0].ids
    end = next(i for i in range(9, 40) if free[i] not in free[:i])
    engine = Engine(
        lm.model, lm.tokenizer, drafter=Oracle(lm), longest_guess=8, adapt_guesses=False
    )
    stopped = replace(request, stop_ids=(free[end],), want_experts=True)
    reply = engine.run([stopped])[0]
    assert (reply.ids, reply.finish_reason) == (free[: end + 1], "stop")
    assert engine.stats().pages_used == 0
    # Guesses behind the stop were read too, but are no part of the reply.
    assert torch.equal(reply.experts, lm.engine.run([stopped])[0].experts)


@pytest.mark.parametrize("how", ["plain", "put back", "guesses"])
def test_experts_are_told_with_the_next_token(plain_lm, how):
    lm = plain_lm
    options = {
        "plain": {},
        "put back": {"memory": 9 * page_bytes(lm), "step_tokens": 16},
        "guesses": {"drafter": Oracle(lm), "longest_guess": 5, "adapt_guesses": False},
    }
    engine = Engine(lm.model, lm.tokenizer, **options[how])
    requests = [replace(prompt(lm, 20, i), max_tokens=60, want_experts=True) for i in (1, 2)]
    told: dict[int, list] = {0: [], 1: []}
    for event in engine.stream(requests):
        told[event.index].append(event.experts)
        if event.completion is not None:
            first, *later = told[event.index]
            assert first is None
            assert event.completion.experts is not None
            assert torch.equal(torch.stack(later), event.completion.experts[20:])
    stats = engine.stats()
    assert (stats.preemptions > 0, stats.accepted > 0) == (how == "put back", how == "guesses")


def test_a_request_that_cannot_be_added_leaves_none_behind(plain_lm, monkeypatch):
    engine, requests = Engine(plain_lm.model, plain_lm.tokenizer), mixed(plain_lm)[:2]
    add = engine.add

    def interrupted(request: Request) -> int:
        if request is requests[1]:
            raise KeyboardInterrupt
        return add(request)

    monkeypatch.setattr(engine, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.run(requests)
    monkeypatch.undo()
    assert not engine.busy
    assert engine.run(requests[1:])[0].ids
