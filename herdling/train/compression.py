"""Gradients between processes in 8 or 4 bits, with error feedback.

Each process sends every other one its share of the gradient in codes, adds what it received in float32,
codes the mean of its share again and sends that to all: 2 bytes a parameter at 8 bits and 1 at 4, where
a ring of float32 sends 8. (Two rounds as in ZeRO++'s qgZ, arXiv 2306.10209, without its hierarchy.)

What rounding took away is added to the next gradient, in both rounds (1-bit Adam, arXiv 2102.02888):
small gradients beside a large one would else be rounded to zero for ever. Only the wire is coded;
every process sums in float32 and ends with the same bits.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from herdling import distributed
from herdling.errors import ConfigError

BLOCK = 128
"""Gradients that share a scale."""


class Compression:
    """The communication hook of DistributedDataParallel, and the errors it carries from step to step."""

    def __init__(self, bits: int, feedback: bool = True) -> None:
        """`feedback` exists for the tests, which show what is lost without it."""
        if bits not in (8, 4):
            raise ConfigError(f"gradient_bits is {bits}; it must be 32, 8 or 4")
        self.bits, self.feedback = bits, feedback
        self.errors: dict[str, Tensor] = {}
        """By bucket: what is still owed of the own gradient, and of the share this process sums."""

    def hook(self, _: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Replace a bucket of gradients by its mean over the processes."""
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(self.mean(bucket.buffer(), str(bucket.index())))
        return done

    @torch.no_grad()
    def mean(self, gradient: Tensor, name: str) -> Tensor:
        """The mean over all processes of a flat gradient (n,), the same on each."""
        world = distributed.world_size()
        missing = -len(gradient) % (world * BLOCK)
        wide = F.pad(gradient.float() / world, (0, missing))
        share = self._total(self._coded(wide, f"{name}.own"), world)
        codes, scales = self._coded(share, f"{name}.share")
        mean = decode(_gathered(codes, world), _gathered(scales, world), self.bits)
        return mean[: len(gradient)].to(gradient.dtype)

    def _coded(self, values: Tensor, name: str) -> tuple[Tensor, Tensor]:
        owed = self.errors.get(name)
        if owed is not None:
            values = values + owed.to(values.device)
        codes, scales = encode(values, self.bits)
        if self.feedback and bool(torch.isfinite(scales).all()):  # else the step will not be taken
            self.errors[name] = values - decode(codes, scales, self.bits)
        return codes, scales

    def _total(self, coded: tuple[Tensor, Tensor], world: int) -> Tensor:
        """The sum of what every process sent of the share that is this one's."""
        received = [torch.empty_like(t) for t in coded]
        for there, own in zip(received, coded, strict=True):
            dist.all_to_all_single(there, own)
        return decode(received[0], received[1], self.bits).view(world, -1).sum(0)

    def rescale(self, factor: float) -> None:
        """What is owed, in units of a loss scale that changed by `factor`."""
        for owed in self.errors.values():
            owed.mul_(factor)

    def state_dict(self) -> dict[str, Any]:
        return {"errors": dict(self.errors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.errors = dict(state["errors"])


def _gathered(part: Tensor, world: int) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(world)]
    dist.all_gather(parts, part)
    return torch.cat(parts)


def encode(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """values (n,), n a multiple of BLOCK -> int8 codes (n,), or at 4 bits uint8 (n / 2,); scales (n / BLOCK,).

    Symmetric, nearest: scale = largest magnitude / (2^(bits - 1) - 1).
    """
    top = 2 ** (bits - 1) - 1
    blocks = values.view(-1, BLOCK)
    scales = blocks.abs().amax(1) / top
    codes = (blocks / torch.where(scales == 0, 1.0, scales)[:, None]).round_().view(-1)
    codes = torch.nan_to_num(codes, 0.0, 0.0, 0.0)  # an infinite scale says it; codes cannot
    if bits == 8:
        return codes.to(torch.int8), scales
    low, high = (codes + 8).to(torch.uint8).view(-1, 2).unbind(1)
    return low | (high << 4), scales


def decode(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """-> (n,) float32; a block whose scale is not finite is not finite."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], 1).to(torch.int8).view(-1) - 8
    values = codes.view(-1, BLOCK).float() * scales[:, None]
    return values.view(-1)
