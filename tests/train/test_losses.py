"""python -m pytest tests/train/test_losses.py"""

import torch
import torch.nn.functional as F

from herdling.train.losses import next_token, routed_tokens, target_tokens


def example() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(0, 32, (2, 9))
    labels = ids[:, 1:].clone()
    labels[0, :3] = -100
    documents = torch.tensor([[0] * 5 + [1] * 3, [0] * 6 + [-1] * 2])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 1]])
    labels[documents < 0] = -100
    return {
        "input_ids": ids[:, :-1],
        "labels": labels,
        "documents": documents,
        "positions": positions,
    }


def test_next_token_is_the_summed_cross_entropy_with_its_gradients(toy):
    batch, model = example(), toy.model()
    value, numbers = next_token(model, batch)
    value.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(batch["input_ids"], positions=batch["positions"], documents=batch["documents"])
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    expected.backward()
    torch.testing.assert_close(value, expected)
    assert numbers == {}
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_a_batch_with_nothing_to_learn_has_loss_and_gradient_zero(toy):
    batch, model = example(), toy.model()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    value, _ = next_token(model, batch)
    value.backward()
    assert value.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_counts_of_a_batch():
    batch = example()
    assert target_tokens(batch) == 16 - 3 - 2
    assert routed_tokens(batch) == 14
    assert routed_tokens({"input_ids": batch["input_ids"]}) == 16
    assert routed_tokens({"x": batch["input_ids"]}) == 0
