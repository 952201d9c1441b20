"""Preference losses and their gradients beside TRL's own code, on the same log-probabilities.

make trl

TRL's trainers do not run on Llama 4 (its fused head takes the model's logits for hidden states), so
what runs here is the loss of its DPO trainer itself, `DPOTrainer._compute_loss`, on a stand-in for
the model that gives fixed log-probabilities of tokens; for simpo and orpo the functions of its CPO
and ORPO trainers. What comes before, log-probabilities of packed answers, is tested beside plain
forward passes in tests/train/test_preference.py.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer

from herdling.train.preference import PreferenceConfig, PreferenceLoss, Scores, pair_losses

PAIRS, TOKENS = 5, 9
LENGTHS = [[3, 8], [5, 5], [1, 6], [7, 2], [4, 4]]
"""Tokens of the chosen and of the rejected answer of each pair."""


def made(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token log-probabilities (2 * PAIRS, TOKENS), chosen first as TRL has it, their mask, references."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(LENGTHS).t().reshape(-1)
    mask = (torch.arange(TOKENS)[None] < lengths[:, None]).double()
    log_p = -torch.rand(2 * PAIRS, TOKENS, generator=generator, dtype=torch.float64) * 3
    reference = -torch.rand(2, PAIRS, generator=generator, dtype=torch.float64) * 12
    return log_p * mask, mask, reference


def trls(config: PreferenceConfig, loss_types: list[str], weights: list[float]) -> tuple[Any, Any]:
    """TRL's loss (a mean over pairs) and its gradient on the log-probabilities."""
    log_p, mask, reference = made()
    log_p.requires_grad_()
    masked = log_p * mask

    def model(**_: Any) -> Any:
        # What TRL only logs: any numbers do.
        zeros = torch.zeros_like(masked)
        return SimpleNamespace(
            log_probs=masked, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )

    def same(tensor: Any) -> Any:
        return tensor

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=same, gather=same),
        args=SimpleNamespace(discopop_tau=0.05, f_alpha_divergence_coef=0.5),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=loss_types,
        loss_weights=weights,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    first = torch.zeros(2 * PAIRS, 1, dtype=torch.long)
    inputs = {
        "input_ids": torch.zeros(2 * PAIRS, TOKENS + 1, dtype=torch.long),
        "attention_mask": torch.ones(2 * PAIRS, TOKENS + 1, dtype=torch.long),
        "completion_mask": torch.cat([first, mask.long()], 1),
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
    loss.backward()
    return loss.detach(), log_p.grad


def ours(config: PreferenceConfig) -> tuple[Any, Any]:
    """Our loss through `PreferenceLoss`, on a stand-in for the model, over the number of pairs."""
    log_p, mask, reference = made()
    log_p.requires_grad_()
    order = (
        torch.arange(2 * PAIRS).view(2, PAIRS).t().reshape(-1)
    )  # ours: chosen, rejected, chosen, ...
    learnt = mask[order].bool()
    batch = {
        "input_ids": torch.zeros(2 * PAIRS, TOKENS, dtype=torch.long),
        "labels": torch.where(learnt, 0, -100),
        "counted": learnt,
        "sequences": torch.arange(2 * PAIRS)[:, None].expand(-1, TOKENS),
        "reference": reference.t().contiguous(),
    }
    total, _ = PreferenceLoss(config)(lambda **_: log_p[order], batch)  # type: ignore[arg-type]
    loss = total / PAIRS
    loss.backward()
    return loss.detach(), log_p.grad


SMOOTHED = {"robust": 0.1, "exo_pair": 0.05}


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair",
                                  "sppo_hard", "apo_zero", "apo_down"])  # fmt: skip
def test_dpo_and_its_variants(kind: Any, beta: float) -> None:
    config = PreferenceConfig(loss=kind, beta=beta, label_smoothing=SMOOTHED.get(kind, 0.0), sft=0)
    (loss, gradient), (theirs, their_gradient) = ours(config), trls(config, [kind], [1.0])
    torch.testing.assert_close(loss, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-9, atol=1e-12)


def test_per_token_sigmoid() -> None:
    config = PreferenceConfig(length_normalised=True, sft=0)
    (loss, gradient), (theirs, their_gradient) = ours(config), trls(config, ["sigmoid_norm"], [1.0])
    torch.testing.assert_close(loss, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-9, atol=1e-12)


def test_the_added_sft_term_is_trls_where_answers_are_equally_long(monkeypatch: Any) -> None:
    """TRL averages over the tokens of a batch, we over each answer's, so that batches add up."""
    monkeypatch.setattr(f"{__name__}.LENGTHS", [[4, 6]] * PAIRS)
    config = PreferenceConfig(sft=0.2)
    theirs = trls(config, ["sigmoid", "sft"], [1.0, 0.2])
    for mine, other in zip(ours(config), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def averages() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = -torch.rand(2, 7, generator=generator) * 2 - 0.05
    return made[0].requires_grad_(), made[1].requires_grad_()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo(smoothing: float) -> None:
    chosen, rejected = averages()
    trainer = SimpleNamespace(alpha=0.0, beta=2.0, simpo_gamma=0.5, label_smoothing=smoothing,
                              loss_type="simpo", accelerator=SimpleNamespace(device="cpu"))  # fmt: skip
    theirs, _, _ = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    config = PreferenceConfig(loss="simpo", beta=2.0, margin=0.5, label_smoothing=smoothing)
    mine = pair_losses(config, Scores(chosen, rejected))
    torch.testing.assert_close(mine, theirs)
    same_gradients(mine, theirs, chosen, rejected)


def test_orpo() -> None:
    chosen, rejected = averages()
    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    theirs = -ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]
    mine = pair_losses(PreferenceConfig(loss="orpo", beta=0.3), Scores(chosen, rejected))
    torch.testing.assert_close(mine, theirs)
    same_gradients(mine, theirs, chosen, rejected)


def same_gradients(mine: torch.Tensor, theirs: torch.Tensor, *inputs: torch.Tensor) -> None:
    for one, other in zip(
        torch.autograd.grad(mine.sum(), inputs),
        torch.autograd.grad(theirs.sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
