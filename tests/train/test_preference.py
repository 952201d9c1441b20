"""Preference losses: hand-computed values, gradients, and the loss on a real batch.

python -m pytest tests/train/test_preference.py       (beside TRL's own code: make trl)
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from herdling.data import embedded
from herdling.data.pair_loader import PairLoader
from herdling.data.preferences import counted, open_pairs
from herdling.data.spec import Opening
from herdling.errors import ConfigError
from herdling.inputs.image_processor import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.model.llama import build
from herdling.tasks.preferences import makers
from herdling.train.preference import (
    PreferenceConfig,
    PreferenceLoss,
    Scores,
    answers,
    pair_losses,
    pairs,
)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# Scores of 2 for the chosen and -1 for the rejected answer, beta 0.5: the margin is 1.5.
HAND = {
    "sigmoid": -math.log(sigmoid(1.5)),
    "hinge": 0.0,
    "ipo": (3 - 1) ** 2,
    "robust": (-0.9 * math.log(sigmoid(1.5)) + 0.1 * math.log(sigmoid(-1.5))) / 0.8,
    "exo_pair": sigmoid(1.5) * math.log(sigmoid(1.5) / 0.9)
    + sigmoid(-1.5) * math.log(sigmoid(-1.5) / 0.1),
    "nca_pair": -math.log(sigmoid(1)) - 0.5 * math.log(sigmoid(-1)) - 0.5 * math.log(sigmoid(0.5)),
    "sppo_hard": (2 - 1) ** 2 + (-1 + 1) ** 2,
    "apo_zero": 1 - sigmoid(1) + sigmoid(-0.5),
    "apo_down": sigmoid(1) + 1 - sigmoid(1.5),
}


@pytest.mark.parametrize("loss", HAND)
def test_by_hand(loss):
    smoothing = 0.1 if loss in ("robust", "exo_pair") else 0.0
    config = PreferenceConfig(loss=loss, beta=0.5, label_smoothing=smoothing)
    found = pair_losses(config, Scores(torch.tensor([2.0]), torch.tensor([-1.0])))
    assert found.item() == pytest.approx(HAND[loss], abs=1e-6)


def test_reference_free_ones_by_hand():
    scores = Scores(torch.tensor([-0.5]), torch.tensor([-2.0]))
    simpo = PreferenceConfig(loss="simpo", beta=2.0, margin=1.0)
    assert pair_losses(simpo, scores).item() == pytest.approx(-math.log(sigmoid(2 * 1.5 - 1)))
    orpo = PreferenceConfig(loss="orpo", beta=0.3)
    p, q = math.exp(-0.5), math.exp(-2.0)
    odds = math.log(p / (1 - p)) - math.log(q / (1 - q))
    assert pair_losses(orpo, scores).item() == pytest.approx(
        -0.3 * math.log(sigmoid(odds)), abs=1e-6
    )


def test_smoothing_is_the_mean_of_both_ways_round():
    scores = Scores(torch.tensor([1.0]), torch.tensor([0.3]))
    plain = PreferenceConfig(beta=0.7)
    there, back = (
        pair_losses(plain, scores),
        pair_losses(plain, Scores(scores.rejected, scores.chosen)),
    )
    smooth = pair_losses(PreferenceConfig(beta=0.7, label_smoothing=0.2), scores)
    torch.testing.assert_close(smooth, 0.8 * there + 0.2 * back)


@pytest.mark.parametrize("loss", [*HAND, "simpo", "orpo"])
def test_gradients_are_those_of_finite_differences(loss):
    smoothing = 0.1 if loss in ("robust", "exo_pair") else 0.0
    config = PreferenceConfig(loss=loss, beta=0.4, label_smoothing=smoothing)
    chosen = torch.tensor([-0.3, -1.2], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-0.9, -0.4], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda c, r: pair_losses(config, Scores(c, r)), (chosen, rejected))


@pytest.mark.parametrize(
    "fields",
    [
        {"beta": 0.0},
        {"sft": -1.0},
        {"sft": float("nan")},
        {"margin": float("nan")},
        {"label_smoothing": 0.5},
        {"loss": "exo_pair"},
    ],
)
def test_bad_settings_are_refused(fields):
    with pytest.raises(ConfigError, match="preference"):
        PreferenceConfig(**fields)


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(embedded.texts(limit=200_000), 512, "compact")


@pytest.fixture(scope="module")
def model(tok) -> nn.Module:
    shape = preset("nano", vision=True, vocab_size=len(tok))
    return initialize(build(replace(shape, image_token_index=tok.patch)), 0)


def loader(tok: Tokenizer, model, data: str = "form,count_shapes", **fields) -> PairLoader:
    processor = ImageProcessor.from_vision_config(model.config.vision)
    sources = open_pairs(data, Opening(tok, processor=processor), makers())
    given = {"count": 6, "batch_size": 3, "length": 192, "without": "format", **fields}
    made = PairLoader(sources, tok, **given)
    made.reference = torch.randn(len(made), 2, generator=torch.Generator().manual_seed(0)) * 3 - 20
    return made


def plainly(model: nn.Module, source, index: int, without: str, tok: Tokenizer):
    """Log-probabilities of both answers of one pair, each run alone: (counted sum, count, mean nll)."""
    pair = source.pair(index)
    rows = []
    for side, mask in zip((pair.chosen, pair.rejected), counted(pair, tok, without), strict=True):
        ids = torch.tensor([side.tokens])
        logits = model(ids, pixel_values=side.tiles) if side.tiles is not None else model(ids)
        log_p = logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        counts = torch.tensor(mask[1:])
        rows.append(
            (log_p[counts].sum(), counts.sum(), -log_p[torch.tensor(side.loss_mask[1:])].mean())
        )
    return rows


@pytest.mark.parametrize("without", ["none", "format", "shared"])
def test_packed_answers_are_as_if_each_stood_alone(tok, model, without):
    made = loader(tok, model, without=without)
    batch = made.batch(range(6))
    assert "pixel_values" in batch
    found = answers(model, batch)
    for place, (number, index) in enumerate(made._places):
        chosen, rejected = plainly(model, made._sources[number], index, without, tok)
        for at, (total, count, nll) in ((2 * place, chosen), (2 * place + 1, rejected)):
            assert found.log_probs[at].item() == pytest.approx(total.item(), abs=1e-3)
            assert found.counted[at] == max(1, count)
            if at % 2 == 0:
                assert found.nll[at].item() == pytest.approx(nll.item(), abs=1e-4)


@pytest.mark.parametrize("fields", [{}, {"loss": "ipo"}, {"length_normalised": True, "sft": 0.0},
                                    {"loss": "simpo"}, {"loss": "hinge", "sft": 1.0}])  # fmt: skip
def test_the_loss_of_a_batch_and_its_gradient(tok, model, fields):
    config = PreferenceConfig(**fields)
    made = loader(tok, model)
    batch = made.batch(range(6))
    model.zero_grad()
    total, numbers = PreferenceLoss(config)(model, batch)
    total.backward()
    gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = torch.zeros(())
    for place, (number, index) in enumerate(made._places):
        sides = plainly(model, made._sources[number], index, "format", tok)
        ratios = []
        for (log_p, count, _), ref in zip(sides, made.reference[place], strict=True):
            ratio = log_p - (ref if config.needs_reference else 0)
            ratios.append(ratio / count if config.averaged else ratio)
        expected = expected + pair_losses(config, Scores(*(r[None] for r in ratios))).sum()
        expected = expected + config.sft * sides[0][2]
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-4)
    assert 0 <= numbers["preferred"] <= pairs(batch) == 6
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().item() + 1e-6
            torch.testing.assert_close(gradient[name], parameter.grad, atol=2e-3 * scale, rtol=1e-3)


def test_a_pair_that_is_preferred_more_and_more(tok, model):
    """A few steps on the same pairs put every chosen answer ahead of where it began."""
    made = loader(tok, model, data="form", count=4)
    batch = made.batch(range(4))
    with torch.no_grad():
        batch["reference"] = answers(model, batch).log_probs.view(-1, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = PreferenceLoss(PreferenceConfig(sft=0.0))
    first, numbers = loss(model, batch)
    assert first.item() == pytest.approx(4 * math.log(2), rel=1e-5)
    assert numbers["preferred"] == 0
    for _ in range(8):
        optimizer.zero_grad()
        loss(model, batch)[0].backward()
        optimizer.step()
    last, numbers = loss(model, batch)
    assert last < first
    assert numbers["preferred"] == 4
