"""python -m pytest tests/infer/test_costs.py: the arithmetic against counting, weight by weight."""

import itertools

import pytest
import torch

from herdling.errors import ConfigError
from herdling.infer.costs import (
    Costs,
    distinct_experts,
    draft_cost,
    expected_tokens,
    predict,
    step_bytes,
)
from herdling.model.config import ModelConfig, preset
from herdling.model.llama import MoE, TextLM, build


@pytest.mark.parametrize(
    ("experts", "tokens", "chosen"), [(4, 3, 1), (4, 3, 2), (5, 2, 3), (3, 4, 3)]
)
def test_distinct_experts_are_those_of_all_choices_counted(experts, tokens, chosen):
    choices = list(itertools.combinations(range(experts), chosen))
    counts = [len(set().union(*way)) for way in itertools.product(choices, repeat=tokens)]
    assert distinct_experts(experts, tokens, chosen) == pytest.approx(sum(counts) / len(counts))


def test_uneven_load_touches_fewer_experts():
    shares = [0.7, 0.2, 0.1]
    counted = sum(
        len(set(way)) * shares[way[0]] * shares[way[1]]
        for way in itertools.product(range(3), repeat=2)
    )
    assert distinct_experts(3, 2, shares=shares) == pytest.approx(counted)
    assert counted < distinct_experts(3, 2)


def test_five_tokens_of_128_experts_touch_almost_five():
    assert distinct_experts(128, 5) == pytest.approx(4.92, abs=0.01)


def bytes_read(config: ModelConfig, distinct: int, tokens: int) -> int:
    """Of a real model: every parameter whole, but of experts and embeddings the rows that are used."""
    model = build(config)
    assert isinstance(model, TextLM)
    total = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    total += tokens * model.model.embed_tokens.weight[0].nbytes
    for module in model.modules():
        if isinstance(module, MoE):
            one = sum(p[0].nbytes for p in module.experts.parameters())
            total -= (config.text.num_local_experts - distinct) * one
    return total


@pytest.mark.parametrize("step", [1, 2], ids=["every layer MoE", "every other"])
def test_bytes_are_those_of_the_parameters(step):
    config = preset("nano", vision=False, interleave_moe_layer_step=step)
    for tokens, distinct in ((1, 1), (5, 3)):
        got = step_bytes(config, tokens, width=4, distinct=distinct)
        assert got == bytes_read(config, distinct, tokens)
    experts = 3 * 96 * 96 * len(config.text.moe_layers or ())
    half = step_bytes(config, width=4, expert_width=2)
    assert step_bytes(config, width=4) - half == pytest.approx(experts * 2)
    routers = 4 * 96 * len(config.text.moe_layers or ())
    without = step_bytes(config, width=4, routed=False)
    assert step_bytes(config, width=4) - without == pytest.approx((experts + routers) * 4)


def test_keys_and_values_count_up_to_the_chunk_in_local_layers():
    config = preset("nano", vision=False)  # three local layers of 4, chunks of 32
    more = step_bytes(config, position=70) - step_bytes(config)
    assert more == (3 * (70 % 32) + 70) * 2 * 32 * 4


def test_expected_tokens_are_the_mean_of_a_run_of_coins():
    a, g = 0.7, 3
    counted = sum((a**n - (a ** (n + 1) if n < g else 0)) * (n + 1) for n in range(g + 1))
    assert expected_tokens(a, g) == pytest.approx(counted)
    assert expected_tokens(0.0, 5) == 1
    assert expected_tokens(1.0, 5) == 6


def test_the_best_length_grows_with_acceptance_and_is_none_where_none_pays():
    costs = Costs(0.1, tuple(1 + 0.1 * g for g in range(9)))
    lengths = [costs.best(a) for a in (0.0, 0.15, 0.5, 0.8, 0.99)]
    assert lengths[:2] == [0, 0]
    assert lengths == sorted(lengths)
    assert lengths[-1] == costs.longest == 8
    assert costs.speedup(0.3, 0) == 1
    # Free drafts and verifications: the more the better, up to tokens per call.
    free = Costs(0.0, (1.0,) * 5)
    assert free.best(0.01) == 4
    assert free.speedup(0.5, 4) == expected_tokens(0.5, 4)


def test_experts_make_verification_dear_and_shared_weights_make_it_cheap():
    scout, maverick = preset("scout", vision=False), preset("maverick", vision=False)
    # Maverick's other layers are dense, and read once however many tokens are checked.
    dear, cheap = (predict(config, 0.0, width=2).verify[4] for config in (scout, maverick))
    assert 1.5 < cheap < dear < 2.6
    dense = preset("scout", vision=False, interleave_moe_layer_step=0)
    assert predict(dense, 0.0).verify[8] == pytest.approx(1, abs=1e-3)
    assert predict(scout, 0.0, latency=1e13).verify[4] == pytest.approx(1, abs=0.01)


def test_a_draft_costs_what_a_token_reads_of_it():
    target = preset("tiny", vision=False)
    small = preset("nano", vision=False, vocab_size=4096)
    assert draft_cost(small, target) == pytest.approx(step_bytes(small) / step_bytes(target))
    shared = draft_cost(target, target, routed=False)
    assert 0.6 < shared < 1
    assert draft_cost(target, target) == 1


def test_costs_out_of_range_are_refused():
    for costs in ((-0.1, (1.0,)), (0.1, ()), (0.1, (1.0, 0.0))):
        with pytest.raises(ConfigError, match="times must be above 0"):
            Costs(*costs)


def test_the_router_of_a_real_model_agrees_with_even_load():
    torch.manual_seed(0)
    logits = torch.randn(4000, 5, 16)
    counts = [len(set(row)) for row in logits.argmax(-1).tolist()]
    assert distinct_experts(16, 5) == pytest.approx(sum(counts) / len(counts), rel=0.02)
