"""python -m pytest tests/infer/test_speculative.py: the rule keeps the target's distribution.

A planted bug (the residual drawn from p) must be seen by the same statistic that the rule passes.
"""

import math

import pytest
import torch

from herdling.infer import speculative
from herdling.infer.costs import Costs, expected_tokens
from herdling.infer.sampler import Sampler, Sampling, choose, probabilities
from herdling.infer.speculative import DraftLength, accept, draw_from, residual

V = 8


class Chains:
    """A target and a draft whose next token depends on the last one only."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.target = torch.randn(V, V, generator=generator) * 1.2
        self.draft = self.target + 0.6 * torch.randn(V, V, generator=generator)

    def run(self, sampling: Sampling, tokens: int, drafted: int) -> tuple[list[int], int]:
        """A text of at least `tokens` tokens, and the number of verifications."""
        sampler, text, calls = Sampler(sampling, seed=5), [0], 0
        q = probabilities(self.draft, sampling)
        while len(text) <= tokens:
            guess = [text[-1]]
            for _ in range(drafted):
                guess.append(draw_from(q[guess[-1]], sampler))
            text += accept(self.target[guess], guess[1:], q[guess[:-1]], sampler)
            calls += 1
        return text, calls


def chi_square(text: list[int], p: torch.Tensor) -> float:
    """Of bigrams against transition probabilities p (V, V), over its 99.9 % point.

    The point is Wilson and Hilferty's; for 56 degrees of freedom 94.5.
    """
    pairs = torch.tensor(text[:-1]) * V + torch.tensor(text[1:])
    seen = torch.bincount(pairs, minlength=V * V).view(V, V).double()
    expected = seen.sum(1, keepdim=True) * p
    possible = p > 0
    assert not seen[~possible].any()
    statistic = float(((seen - expected)[possible] ** 2 / expected[possible]).sum())
    part = 2 / (9 * (int(possible.sum()) - V))
    return statistic / (2 / part / 9 * (1 - part + 3.0902 * math.sqrt(part)) ** 3)


@pytest.fixture(scope="module")
def chains() -> Chains:
    return Chains(0)


def test_the_distribution_is_the_targets_and_calls_are_as_few_as_the_formula_says(chains):
    sampling = Sampling(temperature=1.0)
    text, calls = chains.run(sampling, 60_000, drafted=4)
    p, q = probabilities(chains.target, sampling), probabilities(chains.draft, sampling)
    assert chi_square(text, p) < 1
    # Acceptance depends on the last token, so the formula is a product along the chain.
    overlap = torch.minimum(p, q)  # from a token to an accepted one
    state = torch.bincount(torch.tensor(text), minlength=V).double() / len(text)
    expected, reach = 1.0, start_of_calls(p, q, state, 4)
    for _ in range(4):
        reach = reach @ overlap
        expected += float(reach.sum())
    assert (len(text) - 1) / calls == pytest.approx(expected, rel=0.01)


def start_of_calls(p: torch.Tensor, q: torch.Tensor, state: torch.Tensor, drafted: int):
    """The distribution of the token that a verification begins behind, by power iteration."""
    overlap, rest = torch.minimum(p, q), (p - q).clamp(min=0)
    for _ in range(50):
        here, ends = state, torch.zeros(V, dtype=torch.float64)
        for _ in range(drafted):
            ends += here @ rest
            here = here @ overlap
        state = ends + here @ p
    return state


def test_tokens_per_call_are_the_formulas_where_acceptance_is_the_same_everywhere():
    chains = Chains(1)
    chains.target = chains.target[:1].expand(V, -1)
    chains.draft = chains.draft[:1].expand(V, -1)
    sampling = Sampling(temperature=1.0)
    text, calls = chains.run(sampling, 30_000, drafted=4)
    p, q = probabilities(chains.target, sampling), probabilities(chains.draft, sampling)
    acceptance = float(torch.minimum(p, q)[0].sum())
    assert 0.6 < acceptance < 0.95
    assert (len(text) - 1) / calls == pytest.approx(expected_tokens(acceptance, 4), rel=0.01)


def test_a_residual_drawn_from_p_is_seen(chains, monkeypatch):
    monkeypatch.setattr(speculative, "residual", lambda p, q: p)
    text, _ = chains.run(Sampling(temperature=1.0), 20_000, drafted=4)
    p = probabilities(chains.target, Sampling(temperature=1.0))
    assert chi_square(text, p) > 2


def test_the_distribution_is_the_targets_after_cuts(chains):
    sampling = Sampling(temperature=0.8, top_k=6, top_p=0.9, min_p=0.02)
    text, _ = chains.run(sampling, 20_000, drafted=3)
    assert chi_square(text, probabilities(chains.target, sampling)) < 1


SETTINGS = {
    "greedy": Sampling(),
    "sampled": Sampling(temperature=1.0, top_p=0.95),
    "greedy, penalties": Sampling(repetition_penalty=1.5, frequency_penalty=1.0),
    "sampled, penalties": Sampling(temperature=0.9, presence_penalty=1.5, logit_bias={3: 2.0}),
    "min_tokens": Sampling(temperature=0.7, min_tokens=9),
}


def never_two_alike(last: int):
    """A mask for the place behind `last`."""

    def mask(row: torch.Tensor) -> None:
        row[last] = -math.inf

    return mask


@pytest.mark.parametrize("masked", [False, True], ids=["free", "masked"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_certain_draft_gives_the_very_tokens_of_plain_decoding(chains, name, masked):
    sampling = SETTINGS[name]

    def masks_of(tokens):
        return [never_two_alike(t) for t in tokens] if masked else [None] * len(tokens)

    plain, text = Sampler(sampling, 7, stop_ids=[1]), [0]
    while len(text) < 40:
        text += choose(chains.target[text[-1:]], [plain], masks_of(text[-1:]))[0]
    for wrong in (0, 3, 4):  # how many of four drafted tokens are right at most
        fast, got = Sampler(sampling, 7, stop_ids=[1]), [0]
        while len(got) + 5 < len(text):
            guess = text[len(got) : len(got) + 4]
            guess = [t if i < wrong else (t + 1) % V for i, t in enumerate(guess)]
            before = [got[-1], *guess]
            new = accept(chains.target[before], guess, None, fast, masks_of(before))
            assert len(new) == wrong + 1
            got += new
        assert got == text[: len(got)]


def test_at_temperature_zero_the_draft_distribution_does_not_matter(chains):
    q = torch.full((2, V), 1 / V, dtype=torch.float64)
    first = int(chains.target[0].argmax())
    guess = [first, (int(chains.target[first].argmax()) + 1) % V]
    got = accept(chains.target[[0, *guess]], guess, q, Sampler(Sampling()))
    assert got == [first, int(chains.target[first].argmax())]


def test_penalties_see_tokens_accepted_in_the_same_call():
    logits = torch.zeros(2, V)
    logits[:, 3], logits[:, 4] = 2.0, 1.5
    sampler = Sampler(Sampling(temperature=0.01, frequency_penalty=1.0))
    q = torch.zeros(1, V, dtype=torch.float64)
    q[0, 3] = 1
    assert accept(logits, [3], q, sampler) == [3, 4]


def test_the_residual_is_never_empty():
    p = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert residual(p, p).tolist() == p.tolist()
    assert residual(p, 1 - p).tolist() == [0, 0.5]


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 drafted tokens"):
        accept(torch.zeros(2, V), [1, 2], None, Sampler(Sampling()))


CHEAP = Costs(0.0, tuple(1 + 0.08 * g for g in range(9)))
DEAR = Costs(0.2, tuple(1 + 0.25 * g for g in range(9)))


def decode(costs: Costs, rate, tokens: int, seed: int = 0) -> tuple[float, float, float]:
    """Time of `tokens` tokens where token t would be accepted with rate(t), adaptively: also the
    share of steps that drafted, and the time that the best fixed length takes."""
    generator = torch.Generator().manual_seed(seed)

    def accepted(at: int, drafted: int) -> int:
        for i in range(drafted):
            if torch.rand((), generator=generator) >= rate(at + i):
                return i
        return drafted

    length, at, time, drafting, steps = DraftLength(costs), 0, 0.0, 0, 0
    while at < tokens:
        g = length.choose()
        n = accepted(at, g)
        length.record(g, n)
        at, time = at + n + 1, time + g * costs.draft + costs.verify[g]
        drafting, steps = drafting + (g > 0), steps + 1
    best = []
    for g in range(costs.longest + 1):
        at, fixed = 0, 0.0
        while at < tokens:
            at, fixed = at + accepted(at, g) + 1, fixed + g * costs.draft + costs.verify[g]
        best.append(fixed)
    return time, drafting / steps, min(best)


@pytest.mark.parametrize("costs", [CHEAP, DEAR], ids=["cheap", "dear"])
def test_text_that_cannot_be_guessed_costs_few_percent(costs):
    for tokens in (128, 1024):
        time, drafting, _ = decode(costs, lambda t: 0.0, tokens)
        assert time < 1.04 * tokens
        assert drafting > 0.01  # it goes on probing


@pytest.mark.parametrize("costs", [CHEAP, DEAR], ids=["cheap", "dear"])
@pytest.mark.parametrize("rate", [0.3, 0.6, 0.8, 0.95])
def test_the_length_is_nearly_the_best_fixed_one(costs, rate):
    time, _, best = decode(costs, lambda t: rate, 2000)
    assert time < 1.06 * best


def test_it_finds_back_when_the_text_becomes_easy():
    hard_then_easy = lambda t: 0.0 if t < 500 else 0.95  # noqa: E731
    time, _, _ = decode(DEAR, hard_then_easy, 1500)
    ideal = 500 + 1000 / DEAR.speedup(0.95, DEAR.best(0.95))
    assert time < 1.1 * ideal


def test_nothing_drafted_is_nothing_learnt():
    length = DraftLength(CHEAP)
    before = length.acceptance, length.choose()
    length.record(0, 0)
    assert (length.acceptance, length.choose()) == before
    assert DraftLength(Costs(0, (1.0,))).choose() == 0
    length.record(4, 3)
    assert (length.drafted, length.accepted) == (4, 3)
