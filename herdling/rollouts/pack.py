"""Rollouts as a training batch: packed rows with what each learnt token needs beside it.

Shape letters: B rows, T tokens of a row, L MoE layers, k experts a token.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from herdling.data.packing import IGNORE, Piece, best_fit, fill_row, stack
from herdling.rollouts.rollout import Rollout


def pack(
    rollouts: Sequence[Rollout], advantages: Sequence[float], length: int, pad: int
) -> dict[str, Tensor]:
    """A batch for `train.policy.PolicyLoss`; each rollout has at most `length` tokens.

    Labels are the tokens that the model wrote. With them stand `advantages` and `sampler_logprobs`
    (B, T) float32; `rollout` (B, T) int64 numbers the sequences; `experts` (L, B * T, k) int16 is
    there if the rollouts have any, -1 where no token was read.
    """
    pieces = [_piece(number, one) for number, one in enumerate(rollouts)]
    rows = [[pieces[i] for i in row] for row in best_fit([len(p.tokens) for p in pieces], length)]
    tiles = [piece.tiles for row in rows for piece in row if piece.tiles is not None]
    batch = stack([fill_row(row, length, pad) for row in rows], tiles)
    batch["rollout"] = torch.zeros(len(rows), length, dtype=torch.int64)
    for name in ("advantages", "sampler_logprobs"):
        batch[name] = torch.zeros(len(rows), length)
    experts = None
    first = rollouts[0].experts
    if first is not None:
        experts = torch.full((first.shape[1], len(rows), length, first.shape[2]), -1, dtype=torch.int16)  # fmt: skip
    for r, row in enumerate(rows):
        start = 0
        for piece in row:
            one, end = rollouts[piece.index], start + len(piece.tokens)
            learnt = batch["labels"][r, start:end] != IGNORE
            batch["rollout"][r, start:end] = piece.index
            batch["advantages"][r, start:end] = learnt * advantages[piece.index]
            drawn = torch.tensor(one.logprobs[1:])  # of the label, which is the next token
            batch["sampler_logprobs"][r, start : end - 1] = drawn
            if experts is not None and one.experts is not None:
                experts[:, r, start : start + len(one.experts)] = one.experts.transpose(0, 1)
            start = end
    if experts is not None:
        batch["experts"] = experts.flatten(1, 2)
    return batch


def beside(batch: dict[str, Tensor], examples: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A packed batch with rows of tuning examples (of the same length) after its own.

    What examples do not have is 0 there; `rollout` and `experts` are -1.
    """
    rows, length = examples["input_ids"].shape
    found = {}
    for name, own in batch.items():
        if name == "pixel_values":
            continue
        if name == "experts":
            other = own.new_full((own.shape[0], rows * length, own.shape[2]), -1)
            found[name] = torch.cat([own, other], 1)
            continue
        empty = own.new_full((rows, length), -1 if name == "rollout" else 0)
        found[name] = torch.cat([own, examples.get(name, empty)])
    tiles = [b["pixel_values"] for b in (batch, examples) if "pixel_values" in b]
    if tiles:
        found["pixel_values"] = torch.cat(tiles)
    return found


def _piece(number: int, rollout: Rollout) -> Piece:
    tokens = np.array(rollout.ids, dtype=np.int32)
    labels = np.full_like(tokens, IGNORE)
    labels[:-1] = np.where(rollout.written[1:], tokens[1:], IGNORE)
    return Piece(tokens, labels, 0, number, rollout.tiles, rollout.tiles is not None)
