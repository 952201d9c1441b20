"""Expert use against a count by hand, and its hooks leave nothing behind."""

import torch

from herdling.data.sources import Example
from herdling.eval.experts import expert_use
from herdling.model.llama import Router


def examples(lm):
    patch = lm.tokenizer.patch
    tokens = [5, 6, *[patch] * lm.config.vision.tokens_per_tile, 7]
    tiles = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    yield Example(tokens, [True] * len(tokens), tiles, "pictures")
    yield Example([8, 9, 10], [True] * 3, None, "words")


def test_shares_by_domain_and_modality(lm):
    routers = [m for m in lm.model.modules() if isinstance(m, Router)]
    use = expert_use(lm, examples(lm))
    assert set(use) == {"pictures", "words", "image"}
    for table in use.values():
        assert table.shape == (4, 4)
        torch.testing.assert_close(table.sum(1), torch.ones(4))
    chosen = []
    handle = routers[0].register_forward_hook(lambda m, i, out: chosen.append(out[0]))
    with torch.no_grad():
        lm.model(torch.tensor([[8, 9, 10]]))
    handle.remove()
    want = torch.bincount(chosen[0].flatten(), minlength=4) / 3
    torch.testing.assert_close(use["words"][0], want)
    assert all(not router._forward_hooks for router in routers)


def test_a_dense_model_has_no_experts(make_lm):
    assert expert_use(make_lm(moe_layers=()), [Example([1, 2], [True] * 2, None, "words")]) == {}
