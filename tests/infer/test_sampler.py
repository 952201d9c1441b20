"""The cuts follow their rules exactly: an even grid of uniform numbers shows the whole distribution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herdling.errors import ConfigError
from herdling.infer.sampler import Sampler, Sampling, choose, draw

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
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        Sampling(**settings)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(ConfigError, match="seed is"):
        Sampler(Sampling(), seed)
