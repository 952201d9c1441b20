"""Routed experts whose products are made one by one, for whoever makes them in another way."""

from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor

from herdling.kernels.grouped_matmul import Groups, dispatched
from herdling.model.llama import Experts


class StepwiseExperts(Experts, ABC):
    """Dispatch, `product` with gate_up_proj, SwiGLU, `product` with down_proj, and back.

    Adapters add their changes around `product`, whatever it does.
    """

    def forward(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """x (N, D); chosen (N, k) int64; gates (N, k) -> (N, D)."""
        return dispatched(x, chosen, gates, self.gate_up_proj.shape[0], self._swiglu)

    def _swiglu(self, rows: Tensor, groups: Groups) -> Tensor:
        gate, up = self.product(rows, groups, "gate_up_proj").chunk(2, -1)
        return self.product(F.silu(gate) * up, groups, "down_proj")

    @abstractmethod
    def product(self, rows: Tensor, groups: Groups, name: str) -> Tensor:
        """Rows (M, in), sorted by expert, times their experts' matrices in tensor `name` -> (M, out)."""
