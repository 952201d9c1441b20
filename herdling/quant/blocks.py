"""A tensor seen as blocks that share a scale.

A block has a size along every dimension, so one rule serves all: groups of inputs, rows, experts,
squares, the whole. A size that does not divide its dimension leaves a shorter last block.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from herdling.errors import ConfigError

Per = Literal["tensor", "expert", "row", "group", "square"]


def block_shape(shape: tuple[int, ...], dim: int, per: Per, size: int) -> tuple[int, ...]:
    """Numbers of a block along each dimension of `shape`, whose inputs run along `dim`.

    `tensor`: one block; `expert`: one for each index of the first of three dimensions; `row`: all
    inputs of one output; `group`: `size` inputs of one output; `square`: `size` inputs of `size` outputs.
    """
    if not shape or not -len(shape) <= dim < len(shape):
        raise ConfigError(f"dim {dim} is no dimension of shape {list(shape)}")
    dim %= len(shape)
    if per == "tensor":
        return shape
    if per == "expert":
        return (1, *shape[1:]) if len(shape) > 2 else shape
    block = [1] * len(shape)
    block[dim] = shape[dim] if per == "row" else size
    if per == "square":
        other = max(d for d in range(len(shape)) if d != dim) if len(shape) > 1 else dim
        block[other] = size
    return tuple(block)


def split(x: Tensor, block: tuple[int, ...]) -> Tensor:
    """x (n, m, ..) -> (blocks, size, blocks, size, ..), zeros where the last is shorter."""
    missing = [-length % size for length, size in zip(x.shape, block, strict=True)]
    if any(missing):
        x = F.pad(x, [n for m in reversed(missing) for n in (0, m)])
    pairs = [
        n
        for length, size in zip(x.shape, block, strict=True)
        for n in (length // max(1, size), size)
    ]
    return x.reshape(pairs)


def join(tiles: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What `split` made, as a tensor of `shape` again."""
    pairs = tiles.shape
    x = tiles.reshape([pairs[i] * pairs[i + 1] for i in range(0, len(pairs), 2)])
    for d, length in enumerate(shape):
        if x.shape[d] != length:
            x = x.narrow(d, 0, length)
    return x.contiguous()


def sizes_of(tiles: Tensor) -> list[int]:
    """The dimensions of `tiles` that lie within a block."""
    return list(range(1, tiles.dim(), 2))
