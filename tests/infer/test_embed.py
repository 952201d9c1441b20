"""Pooled vectors against the mean of transformers' own last hidden states.

python -m pytest tests/infer/test_embed.py
"""

import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM

import herdling
from herdling.errors import InputError
from herdling.infer.embed import pooled, reading, shortened


@pytest.fixture(scope="module")
def text_lm(make_lm):
    return make_lm(vision=False)


@pytest.fixture(scope="module")
def reference(text_lm, tmp_path_factory):
    """transformers' Llama4ForCausalLM with the same weights, from a saved folder."""
    folder = tmp_path_factory.mktemp("model")
    herdling.save(text_lm, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30])
@torch.no_grad()
def test_equals_transformers_hidden_states(text_lm, reference, length):
    tok = text_lm.tokenizer
    ids = [tok.bos, *tok.encode("the quick brown fox jumps over the lazy dog " * 4)[:length]]
    hidden = reference(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
    expected = normalize(hidden[0, 1:].mean(0), dim=-1)
    torch.testing.assert_close(
        pooled(text_lm.model, [ids], tok.bos)[0], expected, atol=1e-5, rtol=0
    )


def test_pieces_give_the_same_vector_as_the_whole(text_lm):
    tok = text_lm.tokenizer
    ids = [tok.bos, *tok.encode("and then the dog sleeps" * 3)]
    *parts, last = reading(text_lm.model, ids, tok.bos, piece=5)
    assert len(parts) == (len(ids) - 1) // 5
    torch.testing.assert_close(last, pooled(text_lm.model, [ids], tok.bos)[0], atol=1e-5, rtol=0)


def test_begin_of_text_counts_only_where_it_is_alone(text_lm):
    tok = text_lm.tokenizer
    alone, with_bos, without = pooled(text_lm.model, [[tok.bos], [tok.bos, 40], [40]], tok.bos)
    assert alone.norm() == pytest.approx(1)
    assert not torch.allclose(alone, with_bos, atol=1e-3)
    assert not torch.allclose(with_bos, without, atol=1e-3)  # 40 saw begin_of_text


def test_texts_without_tokens_and_foreign_ids_are_refused(text_lm):
    for ids in ([], [10**6], [-1], [5] * 1000):
        with pytest.raises(InputError):
            pooled(text_lm.model, [ids], text_lm.tokenizer.bos)


def test_a_shortened_vector_has_length_one():
    vector = normalize(torch.tensor([3.0, 4.0, 12.0]), dim=-1)
    torch.testing.assert_close(shortened(vector, 2), torch.tensor([0.6, 0.8]))
    for bad in (0, 4):
        with pytest.raises(InputError, match="dimensions"):
            shortened(vector, bad)
