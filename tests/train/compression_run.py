"""One of two processes that average gradients: python tests/train/compression_run.py RANK FOLDER

Writes what it saw to FOLDER/RANK.pt; `test_compression.py` starts both and judges.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from herdling.train.compression import Compression

N, STEPS = 1000, 150


def gradient(rank: int) -> torch.Tensor:
    """Mostly small numbers with a large one in every block, the same in every step."""
    g = torch.Generator().manual_seed(rank)
    values = 0.01 * torch.randn(N, generator=g)
    values[::100] = 3.0
    return values


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder / 'meet'}", rank=rank, world_size=2)
    seen = {}
    for bits in (8, 4):
        for feedback in (True, False):
            compression = Compression(bits, feedback)
            means = [compression.mean(gradient(rank), "a") for _ in range(STEPS)]
            seen[bits, feedback] = torch.stack(means)
    compression = Compression(4)
    compression.mean(gradient(rank), "a")
    before = {k: v.clone() for k, v in compression.errors.items()}
    overflowed = gradient(rank)
    overflowed[0] = torch.inf if rank else 1.0
    seen["overflow"] = compression.mean(overflowed, "a")
    seen["kept"] = torch.equal(before["a.own"], compression.errors["a.own"]) or rank == 0
    torch.save(seen, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
