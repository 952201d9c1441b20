"""The cuts follow their rules exactly: an even grid of uniform numbers shows the whole distribution."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TypicalLogitsWarper

from herdling.errors import ConfigError
from herdling.infer import sampler as module
from herdling.infer.sampler import (
    Sampler,
    Sampling,
    choose,
    draw,
    log_probs_of,
    probabilities,
    top_of,
)

GRID = 20_000


def shares(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """How often each token is drawn, by inverting the distribution at the middle of GRID cells."""
    uniform = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    drawn = draw(logits.expand(GRID, -1), sampling, uniform)
    return torch.bincount(drawn, minlength=logits.shape[-1]) / GRID


def expected(logits: list[float], s: Sampling) -> list[float]:
    """The same by the definitions, one token after another."""
    probs = torch.tensor(logits).double().div(s.temperature).softmax(-1).tolist()
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    if s.top_k:
        order = order[: s.top_k]
    mass = sum(probs[i] for i in order)
    kept, before = [], 0.0
    for i in order:
        if before <= s.top_p:
            kept.append(i)
        before += probs[i] / mass
    kept = [i for i in kept if probs[i] >= s.min_p * probs[order[0]]]
    total = sum(probs[i] for i in kept)
    return [probs[i] / total if i in kept else 0.0 for i in range(len(probs))]


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.integers(-60, 60), min_size=1, max_size=12, unique=True),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, 13),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_the_distribution_is_the_defined_one(logits, temperature, top_k, top_p, min_p):
    sampling = Sampling(temperature, top_k, top_p, min_p)
    logits = [x / 10 for x in logits]
    got = shares(torch.tensor(logits), sampling)
    want = torch.tensor(expected(logits, sampling))
    torch.testing.assert_close(got, want, atol=2 / GRID, rtol=0)
    exact = probabilities(torch.tensor([logits]), sampling)[0]
    torch.testing.assert_close(exact, want.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("typical_p", [0.05, 0.3, 0.7, 0.95])
def test_typical_sampling_is_that_of_transformers(typical_p):
    torch.manual_seed(0)
    logits = torch.randn(50, 40) * 3
    warped = TypicalLogitsWarper(typical_p)(torch.zeros(50, 1).long(), logits.double())
    got = probabilities(logits, Sampling(1.0, typical_p=typical_p))
    torch.testing.assert_close(got, warped.softmax(-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.7, top_k=7),
        Sampling(1.3, top_p=0.8),
        Sampling(0.9, min_p=0.02),
        Sampling(1.0, typical_p=0.6),
        Sampling(1.1, top_k=20, top_p=0.9, min_p=0.01, typical_p=0.9),
    ],
)
def test_draws_follow_the_probabilities_by_chi_square(sampling):
    torch.manual_seed(1)
    n = 50_000
    logits = torch.randn(1, 30) * 2
    want = probabilities(logits, sampling)[0]
    drawn = draw(logits.expand(n, -1), sampling, torch.rand(n, dtype=torch.float64))
    counts = torch.bincount(drawn, minlength=30).double()
    assert counts[want == 0].sum() == 0
    kept = want > 0
    free = int(kept.sum()) - 1
    statistic = ((counts - n * want)[kept] ** 2 / (n * want[kept])).sum().item()
    assert statistic < free + 4.5 * math.sqrt(2 * max(free, 1)) + 8


def test_the_short_way_to_a_nucleus_cuts_as_sorting_everything_does(monkeypatch):
    torch.manual_seed(2)
    peaked, flat = torch.randn(3, 2000) * 4, torch.randn(3, 2000) * 0.1
    logits = torch.cat([peaked, flat])[[0, 3, 1, 4, 2, 5]]
    for sampling in (Sampling(1.0, top_p=0.9), Sampling(1.0, typical_p=0.9)):
        short = probabilities(logits, sampling)
        assert short[1].count_nonzero() > module.NUCLEUS > short[0].count_nonzero()
        with monkeypatch.context() as patch:
            patch.setattr(module, "NUCLEUS", 10_000)
            torch.testing.assert_close(short, probabilities(logits, sampling), atol=1e-12, rtol=0)


def test_probabilities_at_temperature_zero_are_all_on_the_likeliest():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 0.0]])
    assert probabilities(logits, Sampling()).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_top_p_keeps_the_token_that_crosses_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert (shares(logits, Sampling(1.0, top_p=0.4)) > 0).tolist() == [True, False, False, False]
    assert (shares(logits, Sampling(1.0, top_p=0.6)) > 0).tolist() == [True, True, False, False]
    assert (shares(logits, Sampling(1.0, top_p=0.9)) > 0).tolist() == [True, True, True, False]


@pytest.mark.parametrize("top_p", [1.0, 0.999999])
def test_a_token_that_was_cut_is_never_drawn(top_p):
    logits = torch.full((1, 50_000), -1e4)
    logits[0, [3, 40_000]] = 0.0
    for uniform in (0.0, 0.25, 0.75, 1 - 2**-53):
        token = draw(logits, Sampling(1.0, top_p=top_p), torch.tensor([uniform]).double()).item()
        assert token == (3 if uniform < 0.5 else 40_000)


def test_extreme_temperatures():
    logits = torch.tensor([[1.0, 1.001, -3.0]])
    middle = torch.tensor([0.5]).double()
    assert draw(logits, Sampling(1e-30), middle).item() == 1
    counts = shares(logits[0], Sampling(1e30))
    torch.testing.assert_close(counts, torch.full((3,), 1 / 3), atol=2 / GRID, rtol=0)


def test_greedy_and_logprobs_of_the_raw_logits():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 0.0]])
    hot = Sampling(temperature=100.0, top_k=1)
    ids, logprobs = choose(logits, [Sampler(Sampling()), Sampler(hot)])
    assert ids == [1, 0]
    assert logprobs == pytest.approx(logits.log_softmax(-1)[[0, 1], [1, 0]].tolist(), abs=1e-6)


def test_repetition_penalty_leaves_the_logprob_raw():
    logits = torch.tensor([[3.0, 2.0, -1.0, -1.2]])
    sampler = Sampler(Sampling(repetition_penalty=2.0))
    sampler.see([0])
    ids, logprobs = choose(logits.clone(), [sampler])
    assert ids == [1]  # 3 / 2 < 2
    assert logprobs[0] == pytest.approx(logits.log_softmax(-1)[0, 1].item())
    assert choose(logits, [sampler])[0] == [0]  # now 1 is seen as well: 1.5 > 1
    low = torch.tensor([[-9.0, -9.0, -1.0, -1.2]])
    sampler.see([2])
    assert choose(low, [sampler])[0] == [3]  # -1 * 2 < -1.2
    assert low.tolist() == torch.tensor([[-9.0, -9.0, -1.0, -1.2]]).tolist()


def test_presence_and_frequency_penalties_count_the_reply_only():
    logits = torch.tensor([[2.0, 1.5, 0.0, -1.0]])
    sampler = Sampler(Sampling(presence_penalty=0.2, frequency_penalty=0.4))
    sampler.see([0, 0, 0])
    taken = [choose(logits, [sampler])[0][0] for _ in range(6)]
    # 0 falls to 1.4, 1 to 0.9; then 0 to 1.0, 0.6, and so on: the largest of what is left each time.
    counts, want = [0, 0, 0, 0], []
    for _ in range(6):
        left = [
            x - 0.4 * n - 0.2 * (n > 0) for x, n in zip(logits[0].tolist(), counts, strict=True)
        ]
        want.append(left.index(max(left)))
        counts[want[-1]] += 1
    assert taken == want == [0, 1, 0, 0, 1, 0]


def test_repetition_penalty_counts_a_token_once_however_often_it_came():
    logits = torch.tensor([[4.0, -4.0, 1.0]])
    sampler = Sampler(Sampling(repetition_penalty=2.0))
    sampler.see([0, 1, 0, 0])
    sampler.see([0])
    row = logits[0].clone()
    sampler.adjust(row)
    assert row.tolist() == [2.0, -8.0, 1.0]


def test_logit_bias_bans_and_forces_and_leaves_the_logprob_raw():
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    banned = Sampling(logit_bias={0: -100})
    forced = Sampling(temperature=1.0, logit_bias={3: 100, 1: 0.5})
    assert forced.logit_bias == ((1, 0.5), (3, 100))
    assert hash(forced) == hash(Sampling(temperature=1.0, logit_bias={1: 0.5, 3: 100}))
    ids, logprobs = choose(logits.expand(2, -1), [Sampler(banned), Sampler(forced)])
    assert ids == [1, 3]
    assert logprobs == pytest.approx(logits.log_softmax(-1)[0, [1, 3]].tolist())
    forced.check_vocabulary(4)
    with pytest.raises(ConfigError, match=r"token id 3; the vocabulary is 0\.\.2"):
        forced.check_vocabulary(3)


def test_min_tokens_hold_the_stop_back():
    logits = torch.tensor([[5.0, 4.0, 3.0]])
    sampler = Sampler(Sampling(min_tokens=2), stop_ids=[0])
    assert [choose(logits, [sampler])[0][0] for _ in range(3)] == [1, 1, 0]
    # A grammar says itself where the end is.
    assert choose(logits, [Sampler(Sampling(min_tokens=2), stop_ids=[0])], [lambda row: None])[
        0
    ] == [0]


def test_masks_forbid_after_everything_else():
    def only_two(row: torch.Tensor) -> None:
        row[[0, 1, 3]] = -math.inf

    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0]]).repeat(3, 1)
    samplers = [Sampler(s) for s in (Sampling(logit_bias={0: 100}), Sampling(), Sampling(1.0))]
    ids, logprobs = choose(logits, samplers, [only_two, None, only_two])
    assert ids == [2, 0, 2]
    assert logprobs == pytest.approx(logits.log_softmax(-1)[[0, 1, 2], ids].tolist())
    assert logits[0].tolist() == [5.0, 4.0, 3.0, 2.0]


MANY = [
    Sampling(),
    Sampling(1.0),
    Sampling(0.8, top_k=50),
    Sampling(1.2, top_p=0.9),
    Sampling(1.0, top_p=0.999),
    Sampling(1.0, min_p=0.05),
    Sampling(1.0, typical_p=0.5),
    Sampling(0.9, presence_penalty=1.0, frequency_penalty=0.5, logit_bias={3: 5.0}),
    Sampling(repetition_penalty=1.5, logit_bias={4: 2.0}),
    Sampling(1.2, top_p=0.9, frequency_penalty=1.0),
]


# Two threads and these widths: where torch would split the sum over a row that is alone.
@pytest.mark.parametrize(("threads", "width"), [(1, 34_000), (2, 34_000), (2, 40_000)])
def test_a_row_is_bit_for_bit_the_same_whatever_is_beside_it(threads, width):
    torch.manual_seed(3)
    steps = torch.randn(3, len(MANY), width) * torch.linspace(0.5, 4, len(MANY))[:, None]

    def replies(rows: list[int]) -> dict[int, list[tuple[int, float]]]:
        samplers = {i: Sampler(MANY[i], seed=i) for i in rows}
        found: dict[int, list[tuple[int, float]]] = {i: [] for i in rows}
        for logits in steps:
            for i, *what in zip(rows, *choose(logits[rows], list(samplers.values())), strict=True):
                found[i].append((what[0], what[1]))
        return found

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = replies(list(range(len(MANY))))
        assert replies([7, 3, 9, 1]) == {i: together[i] for i in (7, 3, 9, 1)}
        for i in range(len(MANY)):
            assert replies([i]) == {i: together[i]}
    finally:
        torch.set_num_threads(before)


def test_alternatives_are_the_likeliest_of_the_raw_logits():
    torch.manual_seed(4)
    logits = torch.randn(3, 9)
    want = logits.log_softmax(-1)
    none, some, all_ = top_of(logits, [0, 2, 20])
    assert [len(none), len(some), len(all_)] == [0, 2, 9]
    assert [id for id, _ in all_] == want[2].argsort(descending=True).tolist()
    assert [x for _, x in some] == pytest.approx(want[1].sort(descending=True).values[:2].tolist())
    assert top_of(logits, [0, 0, 0]) == [[], [], []]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_of_given_tokens_in_bounded_blocks(monkeypatch, dtype):
    torch.manual_seed(5)
    logits, ids = torch.randn(11, 50).to(dtype), torch.randint(50, (11,))
    monkeypatch.setattr(module, "BLOCK", 3 * 50 + 7)
    want = logits.double().log_softmax(-1)
    chosen, best_ids, best = log_probs_of(logits, ids, 4)
    torch.testing.assert_close(chosen.double(), want[torch.arange(11), ids], atol=1e-5, rtol=0)
    torch.testing.assert_close(best.double(), want.gather(1, best_ids), atol=1e-5, rtol=0)
    torch.testing.assert_close(best.double(), want.topk(4).values, atol=1e-5, rtol=0)
    chosen, best_ids, best = log_probs_of(logits, ids)
    assert (*chosen.shape, *best.shape, *best_ids.shape) == (11, 11, 0, 11, 0)


def test_each_request_draws_from_its_own_generator():
    logits = torch.zeros(1, 1000)
    hot = Sampling(temperature=1.0)

    def tokens(sampler: Sampler, others: int) -> list[int]:
        rows = [sampler, *(Sampler(hot, 90 + i) for i in range(others))]
        return [choose(logits.expand(len(rows), -1), rows)[0][0] for _ in range(5)]

    assert tokens(Sampler(hot, 7), 0) == tokens(Sampler(hot, 7), 3)
    assert tokens(Sampler(hot, 7), 0) != tokens(Sampler(hot, 8), 0)
    assert tokens(Sampler(hot, None), 0) != tokens(Sampler(hot, None), 0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(temperature=-0.1), "temperature is -0.1"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(temperature=float("inf")), "temperature is inf"),
        (dict(top_k=-1), "top_k is -1"),
        (dict(top_p=0.0), "top_p is 0.0"),
        (dict(top_p=1.1), "top_p is 1.1"),
        (dict(min_p=-0.1), "min_p is -0.1"),
        (dict(repetition_penalty=0), "repetition_penalty is 0"),
        (dict(temperature=True), "temperature is True"),
        (dict(top_k=1.5), "top_k is 1.5"),
        (dict(top_k=True), "top_k is True"),
        (dict(top_p=float("nan")), "top_p is nan"),
        (dict(repetition_penalty=float("inf")), "repetition_penalty is inf"),
        (dict(typical_p=0.0), "typical_p is 0.0"),
        (dict(presence_penalty=2.5), "presence_penalty is 2.5; it must be -2 to 2"),
        (dict(frequency_penalty=float("nan")), "frequency_penalty is nan"),
        (dict(logit_bias={5: 101}), "logit_bias of token 5 is 101; it must be -100 to 100"),
        (dict(logit_bias={5: float("nan")}), "logit_bias of token 5 is nan"),
        (dict(logit_bias={-1: 1}), "logit_bias has token id -1"),
        (dict(logit_bias={"5": 1}), "logit_bias has token id '5'"),
        (dict(logit_bias={"5": 1, 3: 1}), "logit_bias has token id '5'"),
        (dict(temperature="hot"), "temperature is hot"),
        (dict(min_tokens=-1), "min_tokens is -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        Sampling(**settings)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(ConfigError, match="seed is"):
        Sampler(Sampling(), seed)
