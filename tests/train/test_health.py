"""python -m pytest tests/train/test_health.py"""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from herdling import metrics
from herdling.errors import ConfigError, Error
from herdling.train.health import Routing, RoutingConfig, max_violation


def batch(rows: int = 3, length: int = 16) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(0, 32, (rows, length))
    at = torch.arange(ids.shape[1]).expand_as(ids)
    return {"input_ids": ids, "positions": at, "documents": torch.zeros_like(ids)}


def routers(model):
    return [layer.feed_forward.router for layer in model.model.layers]


def record(routing, model, **inputs):
    with routing.recording(inputs.get("documents")):
        return model(**inputs)


def reference_term(model, inputs, share) -> torch.Tensor:
    """The formula, with the router's input caught by hand."""
    total = torch.zeros(())
    caught = {}
    hooks = [
        r.register_forward_hook(lambda m, i, o, n=n: caught.__setitem__(n, (m, i[0])))
        for n, r in enumerate(routers(model))
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    for n, (router, x) in caught.items():
        score = torch.sigmoid(x @ router.weight.T)
        p = (score / score.sum(-1, keepdim=True)).mean(0)
        total = total + len(p) * (share[n] * p).sum()
    return total


def test_the_term_is_the_formula_and_so_is_its_gradient(toy):
    model, inputs = toy.model(), batch()
    share = [torch.tensor([0.7, 0.1, 0.2, 0.0]), torch.tensor([0.25, 0.25, 0.1, 0.4])]
    with Routing(model) as routing:
        routing.share = share
        record(routing, model, **inputs)
        term = routing.term()
        assert term is not None
        weights = [r.weight for r in routers(model)]
        got = torch.autograd.grad(term, weights)
    expected = reference_term(model, inputs, share)
    wanted = torch.autograd.grad(expected, weights)
    torch.testing.assert_close(term, expected)
    for a, b in zip(got, wanted, strict=True):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b)


def test_the_gradient_lowers_the_score_of_the_overloaded_expert(toy):
    model, inputs = toy.model(), batch()
    with Routing(model) as routing:
        routing.share = [torch.tensor([1.0, 0.0, 0.0, 0.0])] * 2
        record(routing, model, **inputs)
        before = routing.term()
        assert before is not None
        before.backward()
        with torch.no_grad():
            for router in routers(model):
                router.weight -= 10.0 * router.weight.grad
        record(routing, model, **inputs)
        after = routing.term()
        assert after is not None
        assert after < before


def test_the_coefficient_changes_the_gradient_of_a_run(toy, tmp_path):
    """A flag that says balancing is on is worth nothing unless the weights feel it."""
    weights = {}
    for coefficient in (0.0, 0.5, 1.0):
        model, _ = toy.run(tmp_path / str(coefficient), steps=2, balance=coefficient, hooks=[])
        weights[coefficient] = routers(model)[0].weight.detach()
        logged = metrics.read(tmp_path / str(coefficient) / "metrics.jsonl")
        assert logged[0]["balance"] == pytest.approx(1.0)  # no history yet: even
        assert logged[1]["balance"] != 1.0
    assert not torch.equal(weights[0.0], weights[0.5])
    assert not torch.equal(weights[0.5], weights[1.0])


def skewed(toy):
    """A model whose first expert gets nearly every token of each layer."""
    model = toy.model()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        for router in routers(model):
            router.weight[0, 0] += 1.0
    return model


@pytest.mark.parametrize(("coefficient", "balanced"), [(0.0, False), (0.1, True)])
def test_a_collapsed_router_spreads_out_only_with_the_term(
    toy, tmp_path, monkeypatch, coefficient, balanced
):
    monkeypatch.setattr(toy, "model", lambda make=toy.model: skewed_once(make))

    def skewed_once(make):
        monkeypatch.setattr(toy, "model", make)
        return skewed(toy)

    toy.run(tmp_path, steps=150, rows=8, balance=coefficient, every=1000, hooks=[], window=50)
    lines = [line for line in metrics.read(tmp_path / "metrics.jsonl") if "loss" in line]
    start = lines[0]["max_violation"]
    end = [sum(line["max_violation"][i] for line in lines[-20:]) / 20 for i in range(2)]
    assert max(start) > 1.5, start
    assert (max(end) < 1.0) == balanced, (start, end)


def test_counts_are_those_of_the_router_and_padding_does_not_count(toy):
    model, inputs = toy.model(), batch()
    inputs["documents"][:, 10:] = -1
    chosen = []
    hook = routers(model)[0].register_forward_hook(lambda m, i, o: chosen.append(o[0]))
    with Routing(model, RoutingConfig(window=1)) as routing:
        record(routing, model, **inputs)
        numbers, _ = routing.finish()
    hook.remove()
    real = (inputs["documents"] >= 0).flatten()
    counts = torch.bincount(chosen[0][real].flatten(), minlength=4)
    assert int(real.sum()) == 30
    torch.testing.assert_close(numbers["expert_load"][0], (counts / 30).double().tolist())
    assert numbers["max_violation"][0] == pytest.approx(max_violation(counts))


def test_entropy_is_one_for_an_undecided_router_and_small_for_a_sure_one(toy):
    model, inputs = toy.model(), batch()
    with torch.no_grad():
        routers(model)[0].weight.zero_()
        model.model.layers[1].post_attention_layernorm.weight.zero_()
        model.model.layers[1].post_attention_layernorm.weight[0] = 1.0
        routers(model)[1].weight.zero_()
        routers(model)[1].weight[0, 0] = 1e4
    with Routing(model) as routing:
        record(routing, model, **inputs)
        numbers, _ = routing.finish()
    assert numbers["router_entropy"][0] == pytest.approx(1.0, abs=1e-6)
    assert numbers["router_entropy"][1] < 1.0


def only_first(router, n):
    """Make a router choose among its first `n` experts only."""
    whole = router.forward

    def forward(x):
        chosen, gates, logits = whole(x)
        return chosen % n, gates, logits

    router.forward = forward


def test_dead_experts_are_named_after_a_window(toy):
    model, inputs = toy.model(), batch()
    only_first(routers(model)[1], 2)
    with Routing(model, RoutingConfig(window=3)) as routing:
        for step in range(3):
            record(routing, model, **inputs)
            numbers, warnings = routing.finish()
            assert bool(warnings) == (step == 2)
    assert numbers["dead_experts"] == 2
    assert warnings == [
        "model.layers.1.feed_forward.router: 2 of 4 experts got no token in 3 steps: 2, 3"
    ]


def test_a_dead_expert_is_in_the_metrics_of_a_run_and_on_screen(toy, tmp_path, capsys):
    make = toy.model

    def dead():
        model = make()
        for router in routers(model):
            only_first(router, 1)
        return model

    toy.model = dead
    try:
        toy.run(tmp_path, steps=1, window=1, hooks=[], show=True)
    finally:
        toy.model = make
    warnings = [
        line["warning"] for line in metrics.read(tmp_path / "metrics.jsonl") if "warning" in line
    ]
    assert len(warnings) == 2
    assert "3 of 4 experts got no token in 1 steps: 1, 2, 3" in warnings[0]
    assert f"step 1: warning: {warnings[0]}" in capsys.readouterr().err.splitlines()


def test_forwards_without_gradients_are_not_counted(toy):
    model, inputs = toy.model(), batch()
    with Routing(model, RoutingConfig(window=1)) as routing:
        with routing.recording():
            with torch.no_grad():
                model(**inputs)  # as a reference model's pass
            model(**inputs)
        numbers, _ = routing.finish()
        model(**inputs)  # outside
        assert routing.finish() == ({}, [])
    assert sum(numbers["expert_load"][0]) == pytest.approx(1.0)


def test_several_passes_in_one_recording_average(toy):
    model, inputs = toy.model(), batch()
    with Routing(model) as routing:
        routing.share = [torch.tensor([0.7, 0.1, 0.1, 0.1])] * 2
        record(routing, model, **inputs)
        once = routing.term()
        with routing.recording():
            for _ in range(3):
                model(**inputs)
        assert once is not None
        torch.testing.assert_close(routing.term(), once)


def checkpointed(model, reentrant: bool):
    for layer in model.model.layers:
        inner = layer.forward
        layer.forward = lambda *a, inner=inner: checkpoint(inner, *a, use_reentrant=reentrant)
    return model


def test_activation_checkpointing_changes_neither_counts_nor_gradients(toy):
    inputs, results = batch(), []
    for model in (toy.model(), checkpointed(toy.model(), reentrant=False)):
        with Routing(model, RoutingConfig(window=1)) as routing:
            routing.share = [torch.tensor([0.7, 0.1, 0.2, 0.0])] * 2
            logits = record(routing, model, **inputs)
            (logits.square().mean() + routing.term()).backward()
            numbers, _ = routing.finish()
        results.append((numbers, {n: p.grad for n, p in model.named_parameters()}))
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, msg=name)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused_rather_than_unbalanced(toy):
    model = checkpointed(toy.model(), reentrant=True)
    with Routing(model) as routing, pytest.raises(Error, match="use_reentrant=False"):
        record(routing, model, **batch())


def test_state_comes_back_and_another_model_is_refused(toy):
    model, inputs = toy.model(), batch()
    with Routing(model) as routing:
        record(routing, model, **inputs)
        routing.finish()
        saved = routing.state_dict()
    other = Routing(toy.model())
    other.load_state_dict(saved)
    for a, b in zip(other.share, routing.share, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ConfigError, match=r"the checkpoint has routers model\.layers\.0"):
        Routing(torch.nn.Linear(1, 1)).load_state_dict(saved)


def test_the_line_shows_every_layer_or_the_worst(toy):
    routing = Routing(toy.model())
    routing.share = [torch.tensor([0.5, 0.25, 0.25, 0.0]), torch.full((4,), 0.25)]
    charts = routing.line().split()
    assert charts[:2] == ["load", "2.0x"]
    assert [len(c) for c in charts[2:]] == [4, 4]
    assert charts[2][3] == "_"
    assert len(set(charts[3])) == 1
    routing.share = [torch.full((128,), 1 / 128)]
    assert routing.line() == "load 1.0x"
    assert Routing(torch.nn.Linear(1, 1)).line() == ""


def test_bad_settings_are_errors():
    for settings in ({"balance": -1.0}, {"window": 0}, {"balance": math.nan}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            RoutingConfig(**settings)
