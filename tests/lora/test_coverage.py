"""python -m pytest tests/lora/test_coverage.py"""

from herdling import lora
from herdling.lora import LoraConfig, coverage, table
from herdling.model.sites import KINDS


def test_a_row_for_each_kind_with_what_is_trained(make_model):
    model = make_model(vision=True)
    whole = sum(p.numel() for p in model.parameters())
    assert sum(row.trainable for row in coverage(model)) == whole
    lora.attach(model, LoraConfig(r=2, targets=("attention", "experts")))
    rows = {row.kind: row for row in coverage(model)}
    assert set(rows) == {*KINDS, "other"}
    assert sum(row.parameters for row in rows.values()) == whole
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(row.trainable for row in rows.values()) == trained
    text = model.config.text
    experts = rows["experts"]
    assert experts.adapted == experts.matrices == 2 * text.num_local_experts * len(text.moe_layers)
    D, F, E = text.hidden_size, text.intermediate_size, text.num_local_experts
    assert experts.trainable == len(text.moe_layers) * E * 2 * (D + 2 * F + F + D)
    assert rows["vision"].adapted == rows["vision"].trainable == 0
    shown = table(model)
    assert f"trainable: {trained:,} beside {whole:,}" in shown
    assert "warning" not in shown


def test_experts_left_out_are_said_to_be(make_model):
    model = make_model()
    lora.attach(model, LoraConfig(targets=("attention",)))
    assert "of the model, are not adapted; remedy: add experts to the targets" in table(model)
