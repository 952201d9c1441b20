"""Where this process stands among its fellows. On one process every function is the identity."""

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def active() -> bool:
    """Whether a process group of more than one process is up."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if active() else 0


def world_size() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if active() else 1


def is_main() -> bool:
    """Whether this process is the one that prints and writes files."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    import torch.distributed as dist

    if active():
        dist.barrier()


def total(tensor: "Tensor") -> "Tensor":
    """The sum of `tensor` over all processes, the same on each; `tensor` itself is left as it is."""
    return _reduced(tensor, "SUM") if active() else tensor


def largest(value: int) -> int:
    """The largest `value` over all processes."""
    import torch

    return int(_reduced(torch.tensor(value), "MAX")) if active() else value


def _reduced(tensor: "Tensor", operation: str) -> "Tensor":
    import torch.distributed as dist

    # NCCL carries GPU tensors only.
    wire = "cuda" if dist.get_backend() == "nccl" else tensor.device
    moved = tensor.clone().to(wire)
    dist.all_reduce(moved, getattr(dist.ReduceOp, operation))
    return moved.to(tensor.device)


def gather(value: T) -> list[T]:
    """The `value` of every process, by rank, on every process. For small things (it pickles)."""
    import torch.distributed as dist

    if not active():
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
