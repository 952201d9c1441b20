"""python -m pytest tests/optim/test_adamw.py"""

import pytest
import torch
from torch import nn

from herdling.errors import ConfigError
from herdling.model import llama
from herdling.model.config import preset
from herdling.optim import adamw
from herdling.optim.adamw import AdamWConfig


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.class_embedding = nn.Parameter(torch.ones(4, 4))
        self.matrix = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


def decay_of(model: nn.Module, config: AdamWConfig) -> dict[str, float]:
    names = {id(p): n for n, p in model.named_parameters()}
    groups = adamw.groups_of(model, config)
    return {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}


def test_only_matrices_decay_unless_asked():
    decays = decay_of(Toy(), AdamWConfig(weight_decay=0.5))
    assert {n for n, d in decays.items() if d} == {"matrix.weight"}
    assert decays.keys() == dict(Toy().named_parameters()).keys()
    everything = AdamWConfig(weight_decay=0.5, decay_vectors=True, decay_embeddings=True)
    assert set(decay_of(Toy(), everything).values()) == {0.5}
    vectors = decay_of(Toy(), AdamWConfig(decay_vectors=True))
    assert vectors["norm.weight"] == vectors["matrix.bias"] == 0.1
    assert vectors["embed.weight"] == vectors["class_embedding"] == 0.0


def test_a_real_model_is_sorted_whole():
    model = llama.build(preset("nano"), device="meta")
    decays = decay_of(model, AdamWConfig())
    assert decays.keys() == dict(model.named_parameters()).keys()
    still = {n for n, d in decays.items() if not d}
    assert all("norm" in n or "embed" in n or n.endswith("bias") for n in still), still
    assert not any(n.endswith(("router.weight", "gate_up_proj", "q_proj.weight")) for n in still)


def test_rate_rules_multiply_and_the_last_match_counts():
    config = AdamWConfig(learning_rate=0.1, rates=("*=0.5", "matrix.*=2"))
    optimizer = adamw.build(Toy(), config)
    rates = {len(g["params"]): g["lr"] for g in optimizer.param_groups}
    model = Toy()
    names = {id(p): n for n, p in model.named_parameters()}
    for group in adamw.groups_of(model, config):
        for p in group["params"]:
            assert group["lr"] == pytest.approx(0.2 if "matrix" in names[id(p)] else 0.05)
    assert sum(rates) > 0


def test_a_rule_that_matches_nothing_is_an_error():
    with pytest.raises(ConfigError, match="'router' matches no trainable parameter"):
        adamw.build(Toy(), AdamWConfig(rates=("router=2",)))
    frozen = Toy()
    frozen.matrix.requires_grad_(False)
    with pytest.raises(ConfigError, match="matches no trainable"):
        adamw.build(frozen, AdamWConfig(rates=("matrix.*=2",)))
    with pytest.raises(ConfigError, match="nothing to train"):
        adamw.build(frozen.requires_grad_(False), AdamWConfig())


@pytest.mark.parametrize(
    "settings",
    [{"learning_rate": 0.0}, {"learning_rate": float("inf")}, {"eps": -1.0}, {"betas": (0.9, 1.0)}, {"weight_decay": -1.0}, {"rates": ("a",)},
     {"rates": ("a=x",)}, {"rates": ("=2",)}, {"rates": ("a=-2",)}],
)  # fmt: skip
def test_bad_settings_are_errors(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        AdamWConfig(**settings)


@pytest.mark.parametrize("implementation", ["auto", "fused", "foreach", "loop"])
def test_a_step_is_the_formula(implementation):
    """AdamW's first two steps by hand, in float64."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False).double()
    config = AdamWConfig(0.1, (0.9, 0.99), 1e-8, 0.2, implementation=implementation)
    optimizer = adamw.build(model, config)
    assert optimizer.defaults["fused"] == (implementation in ("auto", "fused"))
    w, m, v = model.weight.detach().clone(), 0.0, 0.0
    for t in (1, 2):
        gradient = torch.randn(2, 3, dtype=torch.float64)
        model.weight.grad = gradient.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        w = w * (1 - 0.1 * 0.2)
        w = w - 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
    torch.testing.assert_close(model.weight.detach(), w, rtol=1e-9, atol=1e-12)
