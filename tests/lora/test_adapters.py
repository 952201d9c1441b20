"""Adapted models against models whose weights were summed up by hand.

python -m pytest tests/lora/test_adapters.py
"""

import copy
import math

import pytest
import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from herdling import lora
from herdling.errors import ConfigError, InputError
from herdling.kernels.cross_entropy import log_probs
from herdling.lora import LoraConfig
from herdling.model.sites import sites, weight_of
from herdling.train.losses import next_token

VARIANTS = {"scout": {}, "top2": dict(num_experts_per_tok=2), "all-moe": dict(interleave_moe_layer_step=1)}  # fmt: skip


def summed(model, adapters, name=None):
    """name -> W + scale * B A for every parameter of the model, by the formula."""
    weights = {n: p for n, p in model.named_parameters() if ".lora." not in n}
    for site, f in adapters.factors(name).values():
        scale = f.alpha / (math.sqrt(f.r) if f.rslora else f.r)
        product = torch.einsum("eir,ero->eio", f.A, f.B) if site.fused else f.B @ f.A
        weights[site.parameter] = weights[site.parameter] + scale * product
    return weights


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_and_gradients_are_those_of_the_summed_weights(make_model, put_on, ids, fields, rslora):  # fmt: skip
    model = make_model(**fields).double()
    plain = copy.deepcopy(model)
    adapters = put_on(model, rslora=rslora)
    assert not torch.allclose(model(ids), plain(ids), atol=0.1)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = summed(model, adapters)
    ours, theirs = model(ids), functional_call(plain, weights, (ids,))
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)  # logits are float32
    seed = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    for a, b in zip(torch.autograd.grad(ours, trained, seed), torch.autograd.grad(theirs, trained, seed), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_new_adapter_changes_nothing_and_trains_nothing_else(make_model, ids):
    model = make_model()
    before, names = model(ids), [n for n, _ in model.named_parameters()]
    lora.attach(model, LoraConfig(targets=("all", "router")))
    torch.testing.assert_close(model(ids), before, atol=0, rtol=0)
    assert [n for n, _ in model.named_parameters() if ".lora." not in n] == names
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in model.named_parameters() if ".lora." in n}
    assert len(trainable) == 2 * len(sites(model))
    lora.detach(model)
    assert [n for n, _ in model.named_parameters()] == names
    assert {type(m).__name__ for m in model.modules()} == {type(m).__name__ for m in make_model().modules()}  # fmt: skip
    assert all(p.requires_grad for p in model.parameters())


def test_factors_depend_on_name_and_seed_alone(make_model):
    def first(seed, targets):
        model = make_model()
        found = lora.attach(model, LoraConfig(targets=targets), seed=seed).factors()
        return found["model.layers.0.self_attn.q_proj"][1].A

    assert torch.equal(first(0, ("attention",)), first(0, ("all",)))
    assert not torch.equal(first(0, ("all",)), first(1, ("all",)))


@pytest.mark.parametrize("dora", [False, True])
def test_merging_gives_the_same_model_with_plain_weights(make_model, put_on, ids, dora):
    model = make_model(vision=True)
    pixels = torch.randn(1, 3, *[model.config.vision.image_size] * 2)
    ids = ids.clone()
    ids[0, 2 : 2 + model.config.vision.tokens_per_tile] = model.config.image_token_index
    targets = ("attention", "shared", "dense", "head", "vision", "projector") if dora else ("all", "router")  # fmt: skip
    names = [n for n, _ in model.named_parameters()]
    plain = model(ids, pixels)
    put_on(model, targets, dora=dora)
    adapted = model(ids, pixels)
    assert (adapted - plain).abs().max() > 0.1
    lora.merge(model)
    assert [n for n, _ in model.named_parameters()] == names
    torch.testing.assert_close(model(ids, pixels), adapted, atol=3e-5, rtol=0)


def test_losses_that_read_the_heads_weight_see_the_adapted_one(make_model, put_on, ids):
    model = make_model()
    adapters = put_on(model, ("head", "attention"))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    loss, _ = next_token(model, batch)
    logits = model(batch["input_ids"])
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")  # fmt: skip
    torch.testing.assert_close(loss, plain, atol=1e-3, rtol=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(plain, trained), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    read = model(batch["input_ids"], readout=lambda h, head: log_probs(h, head, batch["labels"]))
    torch.testing.assert_close(-read.sum(), plain, atol=1e-3, rtol=0)
    adapters.default = None
    with adapters.using(["adapter", None] * 20), pytest.raises(Exception, match="differs from token"):  # fmt: skip
        _ = model.lm_head.weight


@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(make_model, put_on, ids, autocast):
    model = make_model()
    put_on(model)
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = next_token(model, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]})
        return loss.detach(), torch.autograd.grad(loss, trained)

    loss, plain = gradients()
    for layer in model.model.layers:
        layer.forward = lambda *a, own=layer.forward: checkpoint(own, *a, use_reentrant=False)
    again, checkpointed = gradients()
    assert torch.equal(loss, again)
    for a, b in zip(plain, checkpointed, strict=True):
        assert a.abs().max() > 0
        assert torch.equal(a, b)


def test_autocast_stays_close_to_float32(make_model, put_on, ids):
    model = make_model()
    put_on(model)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(ids)
    exact = model(ids)
    # A few tokens near a tie go to another expert.
    assert ((rough - exact).abs() < 0.15).float().mean() > 0.9


def test_dora_is_the_paper_s_formula(make_model, put_on):
    model = make_model().double()
    adapters = put_on(model, ("attention",), dora=True)
    site, f = adapters.factors()["model.layers.0.self_attn.q_proj"]
    layer = model.get_submodule(site.module)
    x = torch.randn(4, 5, layer.in_features, dtype=torch.float64)
    direction = weight_of(model, site) + f.scale * f.B @ f.A
    weight = f.magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True).detach()
    torch.testing.assert_close(layer(x), x @ weight.T)
    leaves, seed = (f.A, f.B, f.magnitude), torch.randn(4, 5, layer.out_features).double()
    for a, b in zip(torch.autograd.grad(layer(x), leaves, seed), torch.autograd.grad(x @ weight.T, leaves, seed), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)
    with pytest.raises(ConfigError, match="dora=true does not work on experts, which targets name"):
        lora.attach(make_model(), LoraConfig(dora=True))


def test_dora_leaves_a_row_of_zeros_one(make_model, put_on):
    model = make_model()
    layer = model.model.layers[0].feed_forward.gate_proj
    with torch.no_grad():
        layer.weight[3] = 0  # as pruning makes them
    lora.attach(model, LoraConfig(targets=("dense",), dora=True))
    x = torch.randn(4, layer.in_features)
    out = layer(x)
    assert torch.equal(out, torch.nn.functional.linear(x, layer.weight))
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.lora.parameters())
    lora.merge(model)
    assert (layer.weight[3] == 0).all()
    assert layer.weight.isfinite().all()


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_each_token_of_a_call_uses_its_own_adapter(make_model, put_on, ids, fields):
    """One call on rows with a, b and none against three models, each with its weights summed."""
    plain = make_model(**fields)
    model, merged = copy.deepcopy(plain), {}
    for seed, (name, targets) in enumerate({"a": ("all", "router"), "b": ("experts", "head")}.items(), 1):  # fmt: skip
        adapters = put_on(model, targets, name, seed)
        adapters.default = None
        own = copy.deepcopy(model)
        lora.merge(own, name)
        merged[name] = own
    rows = ids.repeat(2, 1)  # (4, T), one document each
    with adapters.using(["a", None, "b", "a"], [rows.shape[1]] * 4):
        mixed = model(rows)
    for row, name in enumerate(["a", None, "b", "a"]):
        alone = merged.get(name, plain)(rows[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=3e-5, rtol=0)
        with adapters.using([name]):
            torch.testing.assert_close(model(rows[row : row + 1]), alone, atol=3e-5, rtol=0)
    torch.testing.assert_close(model(ids), plain(ids), atol=0, rtol=0)
    differences = [(mixed[i] - plain(rows)[i]).abs().max() for i in range(4)]
    assert differences[1] < 1e-4 < 0.1 < min(differences[0], differences[2])


@pytest.mark.parametrize("targets", [("attention",), ("experts",), ("head",)])
def test_names_for_more_or_fewer_tokens_than_there_are_are_told(make_model, put_on, ids, targets):
    model = make_model()
    adapters = put_on(model, targets, "a")
    adapters.default = None
    for lengths in (None, [21, 20], [21, 30]):
        said = f"adapters are named for {sum(lengths or [1, 1])} tokens, and the call has 42"
        with adapters.using(["a", None], lengths), pytest.raises(InputError, match=said):
            model(ids)
    with adapters.using(["a", None], [21, 21]):
        with adapters.using(["a", None]):
            pass
        model(ids)


def test_pictures_are_encoded_for_one_adapter_at_a_time(make_model, put_on, ids):
    """Tokens that adapters are chosen for are the text's: a picture's own would get another one's."""
    model = make_model(vision=True)
    put_on(model, ("all",), "a").default = None
    adapters = put_on(model, ("vision",), "b", 1)
    adapters.default = None
    shown = ids.clone()
    shown[:, 2 : 2 + model.config.vision.tokens_per_tile] = model.config.image_token_index
    pixels = torch.randn(2, 3, *[model.config.vision.image_size] * 2)
    lengths = [ids.shape[1]] * 2
    for names in (["a", "b"], ["a", None]):
        with adapters.using(names, lengths), pytest.raises(InputError, match="pictures are encoded for one adapter"):  # fmt: skip
            model(shown, pixels)
    with adapters.using(["a", "a"], lengths):
        model(shown, pixels)
    with adapters.using(["a", None], lengths):
        model(ids)
    lora.detach(model)
    assert not any("pictures" in vars(m) for m in model.modules())


def test_adapters_come_and_go(make_model, put_on, ids):
    model = make_model()
    plain = model(ids)
    put_on(model, ("attention",), "a").default = None
    adapters = put_on(model, ("experts", "attention"), "b.1")
    assert adapters is lora.of(model)
    adapters.default = None
    with adapters.using(["b.1"]):
        both = model(ids)
    with pytest.raises(ConfigError, match="the model has several; there are: a, b"):
        adapters.factors()
    with pytest.raises(ConfigError, match=r"adapter 'a' is there already"):
        lora.attach(model, LoraConfig(targets=("head",)), "a")
    with pytest.raises(InputError, match=r"adapter 'c' is not loaded; there are: a, b\.1"), adapters.using(["c"]):  # fmt: skip
        pass
    adapters.remove("a")
    with adapters.using(["b.1"]):
        torch.testing.assert_close(model(ids), both, atol=0, rtol=0)
    adapters.remove("b.1")
    assert adapters.names == []
    assert not any(".lora" in name for name, _ in model.named_modules())
    torch.testing.assert_close(model(ids), plain, atol=0, rtol=0)


def test_one_adapter_at_a_time_is_trained(make_model, put_on):
    model = make_model()
    put_on(model)
    with pytest.raises(ConfigError, match="adapter 'adapter' is in training; merge or remove"):
        lora.attach(model, LoraConfig(), "other")


def test_a_rank_beyond_every_matrix_is_refused(make_model):
    model = make_model()
    with pytest.raises(ConfigError, match="lora r is 10000000; no matrix that it reaches has more than"):  # fmt: skip
        lora.attach(model, LoraConfig(r=10_000_000))
    assert lora.of(model).names == []
    assert all(p.requires_grad for p in model.parameters())


def test_a_half_precision_model_gets_factors_of_its_type(make_model, put_on, ids):
    model = make_model().to(torch.bfloat16)
    put_on(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    adapted = model(ids)
    lora.merge(model)
    assert ((adapted - model(ids)).abs() < 0.2).float().mean() > 0.9
