"""Learning from pairs of answers: DPO and its relatives, from log-probabilities to a loss.

    loss = PreferenceLoss(PreferenceConfig(loss="sigmoid", beta=0.1))
    fit(..., loss, weight=pairs)                     # batches of herdling.data.pair_loader

Every loss is a function of four numbers a pair: the log-probability of the chosen and of the rejected
answer under the model and under the reference. Left out: losses that compare pairs of a batch with
one another (AOT), and divergences other than the reverse KL.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from herdling.data.packing import IGNORE
from herdling.kernels.cross_entropy import log_probs
from herdling.train.config import PreferenceConfig
from herdling.train.losses import MODEL_INPUTS, Batch, Numbers


class Scores(NamedTuple):
    """What a loss may look at, each (pairs,): the model's log-ratios to the reference."""

    chosen: Tensor
    rejected: Tensor

    @property
    def delta(self) -> Tensor:
        return self.chosen - self.rejected


def pair_losses(config: PreferenceConfig, scores: Scores) -> Tensor:
    """The loss of each pair, (pairs,).

    `scores` are log p(answer) - log p_ref(answer); divided by the answer's tokens where
    `config.averaged`; without the reference for simpo and orpo.
    """
    return _LOSSES[config.loss](config, scores)


def _log_sigmoid(config: PreferenceConfig, logits: Tensor) -> Tensor:
    """-log sigmoid, of which `label_smoothing` the wrong way round (conservative DPO)."""
    e = config.label_smoothing
    return -(1 - e) * F.logsigmoid(logits) - e * F.logsigmoid(-logits)


def _sigmoid(config: PreferenceConfig, scores: Scores) -> Tensor:
    """DPO, arXiv 2305.18290 eq. 7; with smoothing its conservative form."""
    return _log_sigmoid(config, config.beta * scores.delta)


def _hinge(config: PreferenceConfig, scores: Scores) -> Tensor:
    """SLiC-HF, arXiv 2305.10425, on log-ratios (2309.06657)."""
    return torch.relu(1 - config.beta * scores.delta)


def _ipo(config: PreferenceConfig, scores: Scores) -> Tensor:
    """arXiv 2310.12036 eq. 17, on log-ratios per token; beta is the paper's tau."""
    return (scores.delta - 1 / (2 * config.beta)) ** 2


def _robust(config: PreferenceConfig, scores: Scores) -> Tensor:
    """arXiv 2403.00409 eq. 14: unbiased where `label_smoothing` of the pairs are swapped."""
    e, logits = config.label_smoothing, config.beta * scores.delta
    return (-(1 - e) * F.logsigmoid(logits) + e * F.logsigmoid(-logits)) / (1 - 2 * e)


def _exo_pair(config: PreferenceConfig, scores: Scores) -> Tensor:
    """arXiv 2402.00856 eq. 16: the reverse KL from smoothed labels to the model's preference."""
    e, logits = torch.as_tensor(config.label_smoothing), config.beta * scores.delta
    win, lose = F.logsigmoid(logits), F.logsigmoid(-logits)
    return win.exp() * (win - torch.log1p(-e)) + lose.exp() * (lose - e.log())


def _nca_pair(config: PreferenceConfig, scores: Scores) -> Tensor:
    """arXiv 2402.05369, for pairs."""
    chosen, rejected = (config.beta * s for s in scores)
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _sppo_hard(config: PreferenceConfig, scores: Scores) -> Tensor:
    """arXiv 2405.00675 eq. 4.7 with the winner's probability at 1."""
    half = 0.5 / config.beta
    return (scores.chosen - half) ** 2 + (scores.rejected + half) ** 2


def _apo_zero(config: PreferenceConfig, scores: Scores) -> Tensor:
    """arXiv 2408.06266 eq. 7: for chosen answers better than the model's own."""
    chosen, rejected = (config.beta * s for s in scores)
    return 1 - chosen.sigmoid() + rejected.sigmoid()


def _apo_down(config: PreferenceConfig, scores: Scores) -> Tensor:
    """arXiv 2408.06266 eq. 8: for chosen answers worse than the model's own."""
    return (config.beta * scores.chosen).sigmoid() + 1 - (config.beta * scores.delta).sigmoid()


def _simpo(config: PreferenceConfig, scores: Scores) -> Tensor:
    """arXiv 2405.14734 eq. 6."""
    return _log_sigmoid(config, config.beta * scores.delta - config.margin)


def _orpo(config: PreferenceConfig, scores: Scores) -> Tensor:
    """arXiv 2403.07691 eq. 7 without its NLL, which is `sft` (1 in the paper)."""
    # log odds = log p - log(1 - p), of the probability per token; p = 1 exactly has no odds.
    chosen, rejected = (s - torch.log(-torch.expm1(s.clamp(max=-1e-6))) for s in scores)
    return -config.beta * F.logsigmoid(chosen - rejected)


_LOSSES: dict[str, Callable[[PreferenceConfig, Scores], Tensor]] = {
    "sigmoid": _sigmoid, "hinge": _hinge, "ipo": _ipo, "robust": _robust, "exo_pair": _exo_pair,
    "nca_pair": _nca_pair, "sppo_hard": _sppo_hard, "apo_zero": _apo_zero, "apo_down": _apo_down,
    "simpo": _simpo, "orpo": _orpo,
}  # fmt: skip


class Answers(NamedTuple):
    """Sums over the answers of a batch, each (2 * pairs,): chosen and rejected by turns."""

    log_probs: Tensor
    """log p of the tokens that count for the preference."""
    counted: Tensor
    """How many those are, at least 1."""
    nll: Tensor
    """-log p per token of the whole answer; 0 for rejected ones."""


def answers(model: nn.Module, batch: Batch) -> Answers:
    """Run `model` on the answers of a batch (see herdling.data.pair_loader for its tensors)."""
    labels, sequences = batch["labels"], batch["sequences"]
    given = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    each = model(**given, readout=partial(_read, labels=labels))
    learnt = labels != IGNORE
    log_p, at = each[learnt], sequences[learnt]
    counts = batch["counted"][learnt].to(log_p.dtype)

    def per_answer(values: Tensor) -> Tensor:
        return torch.zeros_like(batch["reference"].flatten()).index_add(0, at, values)

    whole = (at % 2 == 0).to(log_p.dtype)
    length = per_answer(whole).clamp(min=1)
    return Answers(
        per_answer(log_p * counts),
        per_answer(counts).clamp(min=1),
        per_answer(-log_p * whole) / length,
    )


def _read(hidden: Tensor, lm_head: nn.Linear, labels: Tensor) -> Tensor:
    return log_probs(hidden, lm_head, labels)


class PreferenceLoss:
    """The loop's loss on pairs: a sum over the pairs of a micro-batch."""

    def __init__(self, config: PreferenceConfig) -> None:
        self.config = config

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Numbers]:
        config = self.config
        found = answers(model, batch)
        ratio = found.log_probs
        if config.needs_reference:
            ratio = ratio - batch["reference"].flatten()
        if config.averaged:
            ratio = ratio / found.counted
        scores = Scores(ratio[0::2], ratio[1::2])
        nll = found.nll[0::2].sum()
        total = pair_losses(config, scores).sum() + config.sft * nll
        rewards = config.beta * ratio.detach()
        return total, {
            "chosen_reward": rewards[0::2].sum(),
            "rejected_reward": rewards[1::2].sum(),
            "preferred": (scores.delta > 0).sum(),
            "chosen_nll": nll,
        }


def pairs(batch: Batch) -> int:
    """What `PreferenceLoss` is a sum over."""
    return batch["reference"].shape[0]
