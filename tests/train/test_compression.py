"""Coded gradients between two real processes (gloo): python -m pytest tests/train/test_compression.py"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import herdling
from herdling.errors import ConfigError
from herdling.train.compression import BLOCK, Compression, decode, encode

SCRIPT = Path(__file__).with_name("compression_run.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two")
    root = str(Path(herdling.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [sys.executable, str(SCRIPT)]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment) for rank in (0, 1)
    ]
    assert [p.wait(timeout=120) for p in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    spec = importlib.util.spec_from_file_location("compression_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return (module.gradient(0) + module.gradient(1)).double() / 2


def test_every_process_gets_the_same_bits(seen):
    for name in ((8, True), (8, False), (4, True), (4, False)):
        assert torch.equal(seen[0][name], seen[1][name])


@pytest.mark.parametrize(("bits", "top"), [(8, 127), (4, 7)])
def test_one_exchange_is_near(seen, exact, bits, top):
    """Two roundings, each of at most half a step of a block whose largest is about 3."""
    error = (seen[0][bits, False][0].double() - exact).abs().max()
    assert error <= 2 * 3.05 / top / 2


def test_feedback_pays_back_what_rounding_took(seen, exact):
    """The mean over 150 equal steps: the error goes down like 1 / steps; without feedback it stays."""
    for bits in (8, 4):
        with_feedback, without = (
            (seen[0][bits, feedback].double().mean(0) - exact).abs() for feedback in (True, False)
        )
        assert with_feedback.max() < 0.1 * without.max()
    # At 4 bits every small gradient beside the large one is lost without it.
    small = exact.abs() < 0.05
    assert not seen[0][4, False][:, small].any()
    assert seen[0][4, True][:, small].any(0).float().mean() > 0.5


def test_an_overflow_reaches_all_and_is_not_remembered(seen):
    for side in seen:
        assert not torch.isfinite(side["overflow"]).all()
        assert side["kept"]


def test_codes_by_hand():
    values = torch.zeros(BLOCK)
    values[:4] = torch.tensor([7.0, -3.4, 0.5, -7.0])
    codes, scales = encode(values, 4)
    assert codes.numel() == BLOCK // 2
    assert scales.item() == 1.0
    assert codes[0] == (7 + 8) | ((-3 + 8) << 4)
    assert decode(codes, scales, 4)[:4].tolist() == [7.0, -3.0, 0.0, -7.0]
    codes, scales = encode(values, 8)
    assert codes[:2].tolist() == [127, round(-3.4 / 7 * 127)]
    assert not decode(*encode(torch.zeros(BLOCK), 4), 4).any()


def test_other_bits_are_refused():
    with pytest.raises(ConfigError, match="gradient_bits is 2"):
        Compression(2)
