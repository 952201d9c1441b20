"""Policy losses and their gradients beside those of TRL's GRPO trainer, on the same log-probabilities.

make trl

What runs is `GRPOTrainer._compute_loss` itself, on a stand-in for the model that gives fixed
log-probabilities of tokens; the importance weights are worked out as its rollout phase does it.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl.trainer.grpo_trainer import GRPOTrainer

from herdling.train.config import PolicyConfig
from herdling.train.policy import PolicyLoss, Tokens, policy_loss

SEQUENCES, LONGEST = 4, 6
LENGTHS = torch.tensor([6, 2, 5, 3])
CAP = 3.0


def made(seed: int = 0) -> dict[str, torch.Tensor]:
    """Log-probabilities (SEQUENCES, LONGEST) of policy, old policy, sampler and reference, and masks."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(LONGEST)[None] < LENGTHS[:, None]

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(SEQUENCES, LONGEST, generator=g, dtype=torch.float64)

    old = -torch.rand(SEQUENCES, LONGEST, generator=g, dtype=torch.float64) * 3
    policy, sampler, reference = (old + noise(scale) for scale in (0.4, 0.5, 0.3))
    return {"policy": policy.requires_grad_(), "old": old, "sampler": sampler,
            "reference": reference, "mask": mask,
            "advantages": torch.tensor([1.2, -0.8, 0.5, -0.9], dtype=torch.float64)}  # fmt: skip


def trls(config: PolicyConfig) -> tuple[torch.Tensor, torch.Tensor]:
    data = made()
    difference = (data["old"] - data["sampler"]) * data["mask"]
    if config.correction.startswith("sequence"):
        difference = difference.sum(-1, keepdim=True)
    weights = difference.exp()
    if config.correction.endswith("truncate"):
        weights = weights.clamp(max=config.cap)
    elif config.correction.endswith("mask"):
        weights = weights.masked_fill(weights > config.cap, 0.0)
    low, high = config.bounds
    sequence = config.loss == "gspo"

    def same(tensor: Any) -> Any:
        return tensor

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            data["policy"],
            torch.zeros_like(data["old"]),
            None,
        ),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if sequence else "token",
        beta=config.kl,
        loss_type="grpo" if sequence else config.loss,
        epsilon_low=low,
        epsilon_high=1 + high if config.loss == "cispo" else high,
        use_vllm=config.correction != "none",
        vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST,
        accelerator=SimpleNamespace(
            num_processes=1, gather=same, gather_for_metrics=same, reduce=lambda x, reduction: x
        ),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {
        "prompt_ids": torch.zeros(SEQUENCES, 1, dtype=torch.long),
        "prompt_mask": torch.ones(SEQUENCES, 1, dtype=torch.long),
        "completion_ids": torch.zeros(SEQUENCES, LONGEST, dtype=torch.long),
        "completion_mask": data["mask"].long(),
        "advantages": data["advantages"],
        "old_per_token_logps": data["old"],
        "ref_per_token_logps": data["reference"],
        "importance_sampling_ratio": weights,
        "num_items_in_batch": data["mask"].sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    assert data["policy"].grad is not None
    return loss.detach(), data["policy"].grad


def ours(config: PolicyConfig) -> tuple[torch.Tensor, torch.Tensor]:
    data = made()
    at = data["mask"].nonzero(as_tuple=True)
    tokens = Tokens(
        data["policy"][at],
        data["advantages"][at[0]],
        data["sampler"][at],
        at[0],
        data["old"][at],
        data["reference"][at] if config.kl else None,
    )
    total, _ = policy_loss(tokens, config, LONGEST)
    weight = PolicyLoss(config, LONGEST).weight(
        {"labels": torch.zeros_like(at[0]), "rollout": at[0]}
    )
    loss = total / weight
    loss.backward()
    assert data["policy"].grad is not None
    return loss.detach(), data["policy"].grad


@pytest.mark.parametrize("kind", ["dapo", "grpo", "dr_grpo", "gspo", "cispo"])
@pytest.mark.parametrize("kl", [0.0, 0.2])
@pytest.mark.parametrize("correction", ["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])  # fmt: skip
def test_policy_losses(kind: Any, kl: float, correction: Any) -> None:
    clip = (0.2, 0.25) if kind == "gspo" else None  # its own would clip nearly all that is here
    config = PolicyConfig(loss=kind, kl=kl, correction=correction, cap=CAP, clip=clip)
    for mine, theirs in zip(ours(config), trls(config), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
        assert mine.abs().max() > 1e-3
