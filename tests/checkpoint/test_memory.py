"""Opening costs the model and no second copy of it. The full-size figure: benchmarks/load_memory.py.

Run: python -m pytest tests/checkpoint/test_memory.py
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from herdling.checkpoint import Card, save_model
from herdling.model import weights
from herdling.model.config import preset

MEASURE = """
import sys
import torch
from herdling.checkpoint import open_model

def anonymous():
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

torch.set_num_threads(1)
open_model(sys.argv[1])  # a toy: everything lazy is imported before the measurement
from herdling.model import weights
plain, peak = weights.Slot.view, 0

def watched(slot, parameter):  # looks at the memory at each tensor, and after the last one below
    global peak
    peak = max(peak, anonymous())
    return plain(slot, parameter)

weights.Slot.view = watched
before = anonymous()
model, config = open_model(sys.argv[2])
print(max(peak, anonymous()) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_anonymous_memory_is_the_model_alone(tmp_path):
    toy = preset("nano", vision=False, vocab_size=320)
    # 66 MB in bf16, 63 of them in the largest kind of tensor, as in Scout.
    large = preset("nano", vision=False, vocab_size=320, hidden_size=512, num_attention_heads=16,
                   intermediate_size=1024, num_local_experts=5)  # fmt: skip
    for name, config in (("toy", toy), ("large", large)):
        state = {n: torch.ones(s, dtype=torch.bfloat16) for n, s in weights.shapes(config).items()}
        save_model(state, config, tmp_path / name, card=Card("m"), shard_bytes=20_000_000)
    size = sum(2 * torch.Size(shape).numel() for shape in weights.shapes(large).values())
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "toy", tmp_path / "large"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    used = int(run.stdout)
    assert 0.95 * size < used < 1.1 * size + 4e6  # slack for the allocator and the module tree
