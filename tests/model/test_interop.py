"""`herdling.accelerate_transformers`: same outputs and gradients from transformers' own classes."""

import copy

import pytest
import torch
from torch import nn

import herdling
from herdling.errors import ConfigError


@pytest.mark.parametrize("top_k", [1, 2])
def test_outputs_and_gradients_stay(make_pair, image_batch, top_k):
    reference, _ = make_pair(vision=True, num_experts_per_tok=top_k)
    fast = herdling.accelerate_transformers(copy.deepcopy(reference))
    ids, pixels = image_batch([[2], []], 24)
    runs = []
    for model in (reference, fast):
        model.zero_grad()
        out = model(input_ids=ids, pixel_values=pixels, labels=ids, output_router_logits=True)
        out.loss.backward()
        runs.append((out, {n: p.grad for n, p in model.named_parameters()}))
    (slow_out, slow), (fast_out, quick) = runs
    torch.testing.assert_close(fast_out.logits, slow_out.logits, atol=2e-5, rtol=0)
    assert len(fast_out.router_logits) == len(slow_out.router_logits) == 4
    for got, want in zip(fast_out.router_logits, slow_out.router_logits, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    for name, want in slow.items():
        if want is not None:
            assert (quick[name] - want).abs().max() <= 1e-4 * want.abs().max().clamp(min=1e-12), (
                name
            )
    assert fast.state_dict().keys() == reference.state_dict().keys()


def test_generation_runs_through_it(make_pair):
    reference, _ = make_pair(vision=False)
    ids = torch.randint(3, 300, (2, 10), generator=torch.Generator().manual_seed(1))
    want = reference.generate(
        ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids)
    )
    fast = herdling.accelerate_transformers(copy.deepcopy(reference))
    got = fast.generate(
        ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids)
    )
    assert torch.equal(got, want)


def test_a_model_without_moe_is_an_error():
    with pytest.raises(ConfigError, match="Linear holds no Llama4TextMoe"):
        herdling.accelerate_transformers(nn.Linear(2, 2))
