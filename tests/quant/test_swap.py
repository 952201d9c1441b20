"""Whole models swapped to low precision: coverage, refusals, logits, the engine."""

from dataclasses import replace

import pytest
import torch

from herdling import lora
from herdling.errors import ConfigError
from herdling.lora import LoraConfig
from herdling.model.sites import sites
from herdling.quant.formats import round_trip
from herdling.quant.modules import QuantExperts, QuantLinear
from herdling.quant.schemes import scheme
from herdling.quant.swap import main_format, size_of, swap

NAMES = ("int8", "w8a8", "w4a8", "int4_g128", "fp8", "mxfp8", "mxfp6", "mxfp4", "ternary", "nf4")


def rounded_model(model, found):
    """The same model with plain weights that were rounded, told by parameter names alone."""
    parts = {"attention": "self_attn.", "shared": "shared_expert.", "experts": ".experts.",
             "dense": "feed_forward."}  # fmt: skip
    with torch.no_grad():
        for name, p in model.named_parameters():
            kind = next(
                (k for k, part in parts.items() if part in name and "vision" not in name), ""
            )
            if p.dim() > 1 and kind in found.kinds and "router" not in name:
                p.copy_(round_trip(p, found.weights, dim=1))
    return model


@pytest.mark.parametrize(
    ("name", "vision"), [*((name, False) for name in NAMES), ("w4a8", True), ("ternary", True)]
)
def test_logits_are_those_of_rounded_weights(make_model, name, vision):
    found = replace(scheme(name), activations=None)
    plain, model = make_model(vision=vision), make_model(vision=vision)
    ids = torch.randint(3, 300, (2, 21))
    before = plain(ids)
    report = swap(model, found)
    wanted = rounded_model(plain, found)(ids)
    torch.testing.assert_close(model(ids), wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(wanted, before, atol=1e-2)
    assert report.share > 0.3


def test_report_counts_every_byte_and_says_why(make_model):
    model = make_model(vision=True)
    count = sum(p.numel() for p in model.parameters())
    assert main_format(model) == "float32"
    report = swap(model, scheme("w4a8"))
    assert sum(row.parameters for row in report.rows) == count
    assert size_of(model) == (count, report.nbytes)
    assert main_format(model) == "int4_g32"
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert report.nbytes == held
    by_kind = {row.kind: row for row in report.rows if not row.why}
    assert set(by_kind) == {"attention", "shared", "experts", "dense"}
    assert by_kind["experts"].nbytes * 8 == by_kind["experts"].parameters * 4.5
    why = {(row.kind, row.why) for row in report.rows if row.why}
    assert ("router", "its choice rests on small differences") in why
    assert ("head", "not asked for") in why
    assert ("other", "looked up, not multiplied") in why
    text = str(report)
    assert "experts    int4_g32" in text
    assert "warning" not in text
    attention = swap(make_model(), scheme("int8"), ("attention",))
    assert "warning: the experts, " in str(attention)


def test_ends_are_skipped_by_metas_fp8(make_model):
    model = make_model(num_hidden_layers=6, interleave_moe_layer_step=1)
    report = swap(model, scheme("meta-fp8"))
    kinds = [type(layer.feed_forward.experts) is QuantExperts for layer in model.model.layers]
    assert kinds == [False, True, True, True, True, False]
    assert ("experts", "first and last layer") in {(r.kind, r.why) for r in report.rows}
    assert not any(isinstance(m, QuantLinear) for m in model.modules())


def test_sites_are_found_again(make_model):
    model = make_model()
    before = [(site.path, site.kind) for site in sites(model)]
    swap(model, scheme("int8"), ("all",))
    assert [(site.path, site.kind) for site in sites(model)] == before


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (("expert",), "quantize target 'expert' matches nothing; did you mean experts"),
        (("vision",), "quantize target 'vision' matches nothing"),
        (("router",), "is a router and stays as it is"),
        (("*.1.feed_forward.experts.down_proj",), "both matrices or none"),
    ],
)
def test_wrong_targets(make_model, targets, words):
    model = make_model()
    with pytest.raises(ConfigError, match=words):
        swap(model, scheme("int8"), targets)
    assert not any(isinstance(m, QuantLinear | QuantExperts) for m in model.modules())


def test_nothing_to_quantize(make_model):
    dense = make_model(interleave_moe_layer_step=0)
    with pytest.raises(ConfigError, match="the model has no experts; nothing"):
        swap(dense, scheme("ternary"))
    two = make_model(num_hidden_layers=2, interleave_moe_layer_step=1)
    with pytest.raises(ConfigError, match="no experts beside the first and the last layer"):
        swap(two, scheme("meta-fp8"))


def test_adapters_and_double_swaps_are_refused(make_model):
    model = make_model()
    lora.attach(model, LoraConfig(r=2, targets=("attention",)))
    with pytest.raises(ConfigError, match="is a LoraLinear, not a plain weight; merge or remove"):
        swap(model, scheme("int8"))
    model = make_model()
    swap(model, scheme("int8"))
    with pytest.raises(ConfigError, match="is a QuantLinear"):
        swap(model, scheme("int8"))


@pytest.mark.parametrize("name", ["int4", "fp8", "mxfp4"])
def test_weights_that_are_no_numbers(make_model, name):
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].feed_forward.experts.down_proj[2, 3, 4] = torch.inf
    with pytest.raises(
        ConfigError, match=r"layers.1.feed_forward.experts.down_proj holds inf or NaN"
    ):
        swap(model, scheme(name))
