"""float16 training: autocast, and a loss scale that keeps small gradients above float16's floor.

The loss is multiplied by a power of two before the backward pass and the gradients divided by it
after (Micikevicius et al., arXiv 1710.03740). A gradient that is not finite skips the step and halves
the scale; `GROW_AFTER` clean steps in a row double it. The rule is `torch.amp.GradScaler`'s; ours is
part of the checkpoint, so that a resumed run is the same run, and works on a CPU.

Only float16 needs this: bfloat16 has float32's range, and the low-precision casts scale themselves.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

GROW_AFTER = 2000
LARGEST = 2.0**24


class LossScale:
    """The scale and the number of clean steps since it last changed."""

    def __init__(self, scale: float = 2.0**16, grow_after: int = GROW_AFTER) -> None:
        self.scale, self.grow_after, self.clean = scale, grow_after, 0

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.float16)

    @torch.no_grad()
    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Divide gradients by the scale, in place; exact, as it is a power of two."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(1 / self.scale)

    def update(self, finite: bool) -> None:
        """After a step whose gradients were finite or not."""
        self.clean = self.clean + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.clean == self.grow_after:
            self.scale, self.clean = min(self.scale * 2, LARGEST), 0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "clean": self.clean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self.clean = state["scale"], state["clean"]
