"""AdamW whose two averages take one byte a parameter each (Dettmers et al., arXiv 2110.02861).

The step is torch's: decay, averages, bias correction. The averages are decoded, moved, used and coded
again piece by piece, so that nothing as large as a parameter is made in float32. Tensors of fewer than
4096 numbers keep float32 averages.

Blocks never cross the first dimension of a 3-D parameter, so that each expert has its own scales.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from herdling.optim.dynamic_code import BLOCK, decode, encode

SMALL = 4096
"""Numbers below which a tensor's averages stay float32, as in bitsandbytes."""
PIECE = 2**16
"""Numbers handled at a time on a CPU: what fits its cache."""
PIECE_CUDA = 2**24
"""The same on a GPU, where each piece costs launches."""


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with 8-bit averages; settings and parameter groups as torch.optim.AdamW."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_fresh(parameter))
        state["step"] += 1
        gradient = parameter.grad
        assert gradient is not None
        if "exp_avg" in state:
            _move(parameter, gradient.float(), state["exp_avg"], state["exp_avg_sq"], state, group)
            return
        n = state["exp_avg_scale"].shape[0]
        weights, gradients = parameter.view(n, -1), gradient.reshape(n, -1)
        codes = [state[f"{name}_code"].view(n, -1) for name in _NAMES]
        scales = [state[f"{name}_scale"] for name in _NAMES]
        size = PIECE_CUDA if parameter.is_cuda else PIECE
        for row in range(n):
            for a in range(0, weights.shape[1], size):
                b, blocks = a + size, slice(a // BLOCK, (a + size) // BLOCK)
                m, v = (
                    decode(code[row, a:b], scale[row, blocks], signed)
                    for code, scale, signed in zip(codes, scales, _SIGNED, strict=True)
                )
                _move(weights[row, a:b], gradients[row, a:b].float(), m, v, state, group)
                for new, code, scale, signed in zip((m, v), codes, scales, _SIGNED, strict=True):
                    code[row, a:b], scale[row, blocks] = encode(new, signed)


_NAMES = ("exp_avg", "exp_avg_sq")
_SIGNED = (True, False)


def _fresh(parameter: Tensor) -> dict[str, Tensor]:
    state = {"step": torch.zeros(())}
    for name, signed in zip(_NAMES, _SIGNED, strict=True):
        if parameter.numel() < SMALL:
            state[name] = torch.zeros_like(parameter, dtype=torch.float32)
            continue
        n = parameter.shape[0] if parameter.dim() == 3 else 1
        blocks = -(-(parameter.numel() // n) // BLOCK)
        zero, _ = encode(torch.zeros(1), signed)
        code = torch.full_like(parameter, int(zero), dtype=torch.uint8)
        state[f"{name}_code"] = code.contiguous()
        state[f"{name}_scale"] = torch.zeros(n, blocks, device=parameter.device)
    return state


def _move(
    weight: Tensor,
    gradient: Tensor,
    average: Tensor,
    square: Tensor,
    state: dict[str, Tensor],
    group: dict[str, Any],
) -> None:
    """One AdamW update of a weight (any float type) and its float32 averages, all in place."""
    step, (beta1, beta2) = float(state["step"]), group["betas"]
    average.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    weight.add_((average / root).to(weight.dtype), alpha=-group["lr"] / (1 - beta1**step))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all the tensors that an optimizer remembers."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
