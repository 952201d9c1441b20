"""float16 training and its loss scale: python -m pytest tests/train/test_loss_scale.py"""

import random
import re
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState

from herdling import metrics
from herdling.optim import adamw_8bit
from herdling.train.compression import Compression
from herdling.train.guard import NotFinite
from herdling.train.loss_scale import LossScale
from herdling.train.losses import next_token


def lines(out) -> list[dict]:
    return [line for line in metrics.read(out / "metrics.jsonl") if "loss" in line]


def test_the_rule_is_gradscalers():
    """Against torch's own over a random history of overflows."""
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    ours, draw = LossScale(2.0**16, grow_after=3), random.Random(0)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter])
    theirs.scale(torch.zeros(()))  # it makes its state at the first use
    for _ in range(60):
        finite = draw.random() < 0.75
        parameter.grad = torch.full((1,), 1.0 if finite else torch.inf)
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        ours.update(finite)
        assert ours.scale == min(theirs.get_scale(), 2.0**24)


def test_float16_learns_and_gives_the_same_gradients(toy, tmp_path):
    toy.run(tmp_path / "fp16", steps=15, precision="fp16", loss_scale=LossScale())
    toy.run(tmp_path / "fp32", steps=15)
    half, full = lines(tmp_path / "fp16"), lines(tmp_path / "fp32")
    assert half[0]["loss"] == pytest.approx(full[0]["loss"], abs=2e-3)
    assert half[0]["grad_norm"] == pytest.approx(full[0]["grad_norm"], rel=2e-2)
    assert half[-1]["loss"] == pytest.approx(full[-1]["loss"], abs=0.1)
    assert half[0]["loss"] != full[0]["loss"]  # it was float16


def test_an_overflow_skips_the_step_and_halves_the_scale(toy, tmp_path):
    """An inf injected into one gradient of step 3; the scale doubles after 2 clean steps."""
    weights = []

    def loss(model, batch):
        value, numbers = next_token(model, batch)
        calls.append(1)
        if len(calls) == 5:  # first micro-batch of step 3
            value.register_hook(lambda gradient: gradient * float("inf"))
        weights.append(next(model.parameters()).detach().clone())
        return value, numbers

    calls: list[int] = []
    scale = LossScale(2.0**10, grow_after=2)
    toy.run(tmp_path, steps=6, precision="fp16", loss_scale=scale, loss=loss)
    seen = lines(tmp_path)
    assert [line["loss_scale"] for line in seen] == [1024, 1024, 2048, 1024, 1024, 2048]
    assert ["grad_norm" in line for line in seen] == [True, True, False, True, True, True]
    moved = [not torch.equal(a, b) for a, b in zip(weights[::2], weights[2::2], strict=False)]
    assert moved == [True, True, False, True, True]
    assert scale.state_dict() == {"scale": 2048.0, "clean": 1}


@pytest.mark.parametrize("what", ["fp16", "states"])
def test_resume_is_exact(toy, tmp_path, monkeypatch, what):
    """The scale, and 8-bit averages, come back as they were: all bytes compared."""
    monkeypatch.setattr(adamw_8bit, "SMALL", 64)

    def run(out, **settings):
        AcceleratorState._reset_state(True)
        if what == "fp16":
            settings |= dict(precision="fp16", loss_scale=LossScale(2.0**10, grow_after=2))
        else:
            settings["state_bits"] = 8
        toy.run(out, steps=7, every=3, keep=3, **settings)

    run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for later in ("step-00000006", "step-00000007"):
        shutil.rmtree(tmp_path / "cut/checkpoints" / later)
    run(tmp_path / "cut", resume=True)
    whole = toy.result(tmp_path / "whole", 7)
    assert toy.result(tmp_path / "cut", 7) == whole
    if what == "states":
        assert b"exp_avg_sq_code" in whole["optimizer.json"]
    else:
        assert lines(tmp_path / "cut")[-1]["loss_scale"] == 2.0**13


def test_what_no_scale_can_help_stops_the_run(toy, tmp_path):
    def loss(model, batch):
        value, numbers = next_token(model, batch)
        if value.requires_grad:
            value.register_hook(lambda gradient: gradient * float("inf"))
        return value, numbers

    with pytest.raises(NotFinite, match=re.escape("step 3: loss")):
        toy.run(tmp_path / "a", precision="fp16", loss_scale=LossScale(4.0), loss=loss)
    with pytest.raises(NotFinite, match="step 1: loss nan"):
        toy.run(tmp_path / "b", precision="fp16", loss_scale=LossScale(),
                loss=lambda m, b: (next_token(m, b)[0] * float("nan"), {}))  # fmt: skip


def test_what_is_owed_follows_the_scale():
    compression = Compression(4)
    compression.errors = {"0.own": torch.ones(3)}
    compression.rescale(0.5)
    assert compression.state_dict()["errors"]["0.own"].tolist() == [0.5] * 3
