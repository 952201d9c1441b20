"""python -m pytest tests/train/test_guard.py"""

import pytest
import torch
from safetensors.torch import load_file

from herdling.train.guard import blame, keep_batches
from herdling.train.losses import next_token


@pytest.fixture
def batches(toy):
    stream = iter(toy.Batches(noise=0.0))
    return [next(stream), next(stream)]


def test_a_bad_parameter(toy, batches):
    model = toy.model()
    with torch.no_grad():
        model.model.layers[1].feed_forward.experts.down_proj[2, 0, 0] = torch.inf
    expected = "parameter model.layers.1.feed_forward.experts.down_proj"
    assert blame(model, batches, next_token) == expected


def test_a_bad_input(toy, batches):
    batches[1]["pixel_values"] = torch.tensor([1.0, torch.nan])
    loss = lambda model, batch: (torch.zeros(()), {})  # noqa: E731
    assert blame(toy.model(), batches, loss) == "batch pixel_values of micro-batch 1"


def test_the_first_bad_activation_is_the_one_named(toy, batches):
    model = toy.model()
    with torch.no_grad():  # finite weights whose product is not
        model.model.layers[0].self_attn.v_proj.weight.fill_(3e38)
    named = blame(model, batches, next_token)
    assert named == "activation of module model.layers.0.self_attn.v_proj, micro-batch 0"


def test_a_bad_loss_of_finite_activations(toy, batches):
    def loss(model, batch):
        value, numbers = next_token(model, batch)
        return torch.log(value - value - 1.0), numbers

    assert blame(toy.model(), batches, loss) == "loss, micro-batch 0"


def test_the_first_bad_gradient_in_backward_order(toy, batches):
    model = toy.model()
    model.model.layers[0].self_attn.q_proj.weight.grad = torch.full((16, 16), torch.nan)
    model.model.layers[1].self_attn.q_proj.weight.grad = torch.full((16, 16), torch.inf)
    model.lm_head.weight.grad = torch.zeros_like(model.lm_head.weight)
    expected = "gradient of parameter model.layers.1.self_attn.q_proj.weight"
    assert blame(model, batches, next_token) == expected


def test_no_hook_stays_and_no_gradient_changes(toy, batches):
    model = toy.model()
    assert blame(model, batches, next_token) == "the sum over the batch"
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_kept_batches_come_back(batches, tmp_path):
    keep_batches(tmp_path / "bad", batches)
    for number, batch in enumerate(batches):
        kept = load_file(tmp_path / f"bad/micro-{number}.safetensors")
        assert kept.keys() == batch.keys()
        assert all(torch.equal(kept[name], batch[name]) for name in kept)
