"""Names that mean a set of matrices and no more; opening is tested in test_peft_folder.py.

python -m pytest tests/lora/test_peft_config.py
"""

from herdling.lora.peft_config import PeftConfig, shortest, to_peft
from herdling.model.sites import select

NAMES = ["a.0.attn.q", "a.1.attn.q", "a.1.mlp.q", "vision.a.0.attn.q", "a.1.mlp.up"]


def test_the_shortest_end_of_a_name_that_means_no_other():
    assert shortest({"a.1.mlp.up"}, NAMES) == ["up"]
    assert shortest({"a.1.mlp.up"}, NAMES, least=2) == ["mlp.up"]
    assert shortest({n for n in NAMES if n.endswith("q")}, NAMES) == ["q"]
    assert shortest({"a.1.attn.q"}, NAMES) == ["1.attn.q"]
    assert shortest({"vision.a.0.attn.q"}, NAMES) == ["vision.a.0.attn.q"]


def test_every_kind_alone_is_read_back_as_itself(make_model, put_on):
    model = make_model(vision=True)
    for kind in ("attention", "shared", "experts", "dense", "router", "head", "vision", "projector"):  # fmt: skip
        adapters = put_on(model, (kind,))
        raw = to_peft(model, adapters.factors(), "")
        adapters.remove("adapter")
        assert set(PeftConfig(raw, "x").targets(model)) == set(select(model, (kind,))), kind
