"""Losses of the loop: each maps (model, batch) to the sum over a micro-batch, and named numbers.

Sums, not means: the loop divides by what the whole global batch weighs (`target_tokens` over all
micro-batches and processes), so that splitting a batch differently never changes the step. Named
numbers are sums too, shown after the same division, or pairs (sum, weight of its own).
"""

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from herdling.data.packing import IGNORE
from herdling.kernels.cross_entropy import weighted_nll

Batch = Mapping[str, Tensor]
Numbers = Mapping[str, Tensor | tuple[Tensor, Tensor]]
MODEL_INPUTS = ("input_ids", "pixel_values", "positions", "documents")
"""The tensors of a batch that the model takes; the others are the loss's own."""


def next_token(model: nn.Module, batch: Batch) -> tuple[Tensor, Numbers]:
    """Sum over target tokens of -log p(label), in nats; the full logits never exist.

    batch: input_ids, labels (already shifted; -100 is skipped), positions, documents, each (B, T)
    int64, and pixel_values (tiles, 3, S, S) where it has images.
    """
    labels = batch["labels"]
    readout = partial(_nll, labels=labels, weights=(labels != IGNORE).float())
    given = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    return model(**given, readout=readout), {}


def _nll(hidden: Tensor, lm_head: nn.Linear, labels: Tensor, weights: Tensor) -> Tensor:
    return weighted_nll(hidden, lm_head, labels, weights)


def target_tokens(batch: Batch) -> int:
    """How many positions of a batch are learnt: what `next_token` is a sum over."""
    return int((batch["labels"] != IGNORE).sum())


def routed_tokens(batch: Batch) -> int:
    """How many tokens of a batch are real, that is, in a document whose id is not negative."""
    if "documents" in batch:
        return int((batch["documents"] >= 0).sum())
    return batch["input_ids"].numel() if "input_ids" in batch else 0
