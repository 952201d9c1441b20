"""python -m pytest tests/model/test_sites.py"""

import pytest

from herdling.errors import ConfigError
from herdling.model.sites import KINDS, kind_of, select, sites


def test_every_matrix_of_a_product_is_a_site_of_a_kind(make_model):
    model = make_model(vision=True)
    found = sites(model)
    assert {site.kind for site in found} == set(KINDS)
    # All parameters of two axes and more, but for those that are looked up or added.
    products = {n for n, p in model.named_parameters() if p.dim() > 1 and "embed_" not in n and "positional" not in n}  # fmt: skip
    assert {site.parameter for site in found} == products
    assert all(kind_of(site.path) == site.kind for site in found)
    others = {n for n, _ in model.named_parameters() if kind_of(n) == "other"}
    assert all("norm" in name or "embed_tokens" in name for name in others)


def test_kinds_and_patterns(make_model):
    model = make_model()
    paths = lambda *targets: [site.path for site in select(model, targets)]  # noqa: E731
    assert len(paths("attention")) == 4 * model.config.text.num_hidden_layers
    assert paths("head") == ["lm_head"]
    assert paths("experts")[:2] == [
        "model.layers.1.feed_forward.experts.gate_up_proj",
        "model.layers.1.feed_forward.experts.down_proj",
    ]
    assert paths("model.layers.0.self_attn.?_proj", "attention") == paths("attention")
    everything = {site.path for site in sites(model)}
    routers = {path for path in everything if path.endswith("router")}
    assert set(paths("all")) == set(paths("*")) == everything - routers  # asked for by name only
    assert set(paths("router")) == set(paths("*.router")) == routers != set()


def test_a_target_that_matches_nothing_is_an_error_that_names_what_exists(make_model):
    with pytest.raises(ConfigError) as caught:
        select(make_model(), ("attention", "expert"))
    assert str(caught.value).startswith(
        "lora target 'expert' matches nothing; did you mean experts? the model has attention (16), "
    ), caught.value
    for kind in ("vision", "projector"):
        with pytest.raises(ConfigError, match=f"lora target '{kind}' matches nothing; .* head"):
            select(make_model(), (kind,))
