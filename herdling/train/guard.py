"""The NaN guard: when a step is not finite, say which tensor broke first and keep its batch.

The cheap check (loss and gradient norm) is the loop's, each step, before the weights change. Only
after it fires does `blame` run the forward pass again with every module watched.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from herdling.errors import Error
from herdling.files import atomic_file
from herdling.train.losses import Batch


class NotFinite(Error):
    """Loss or gradient became NaN or infinite; the message names the first bad tensor."""


def blame(
    model: nn.Module, batches: Sequence[Batch], loss: Callable[[nn.Module, Batch], Any]
) -> str:
    """Name the first tensor that is not finite: of the weights, the batch, the forward, the gradients.

    `model` still holds the gradients of the failed step; `batches` are its micro-batches on the
    device. Run again without gradients; a kernel that only fails now and then may not show it.
    """
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"parameter {name}"
    for number, batch in enumerate(batches):
        for name, tensor in batch.items():
            if not _finite(tensor):
                return f"batch {name} of micro-batch {number}"
        where = _first_activation(model, batch, loss)
        if where:
            return f"{where}, micro-batch {number}"
    # A backward pass runs from the last layer to the first: what broke first stands last.
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not _finite(parameter.grad):
            return f"gradient of parameter {name}"
    return "the sum over the batch"


def _first_activation(
    model: nn.Module, batch: Batch, loss: Callable[[nn.Module, Batch], Any]
) -> str | None:
    found: list[str] = []

    def watch(name: str):
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple | list) else (output,)
            if any(isinstance(o, Tensor) and not _finite(o) for o in outputs):
                found.append(name)

        return hook

    # The whole model's own output may be the loss itself, which is named below.
    hooks = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if n]
    try:
        with torch.no_grad():
            value, _ = loss(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return f"activation of module {found[0]}"
    return None if _finite(value) else "loss"


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all())


def keep_batches(folder: Path, batches: Sequence[Batch]) -> None:
    """Write micro-batch i to `folder`/micro-i.safetensors."""
    for number, batch in enumerate(batches):
        with atomic_file(folder / f"micro-{number}.safetensors") as temporary:
            save_file({k: v.cpu().contiguous() for k, v in batch.items()}, temporary)
