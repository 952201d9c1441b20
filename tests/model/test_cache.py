"""Cached decoding equals the full forward for any split, and local layers stay within one chunk."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from herdling.errors import InputError
from herdling.model.cache import Cache
from herdling.model.llama import build

CHUNK, LENGTH = 8, 29


@pytest.fixture(scope="module", params=["scout", "maverick"])
def ours(request, make_pair):
    scout = request.param == "scout"
    extra = {} if scout else dict(interleave_moe_layer_step=2, use_qk_norm=False)
    return make_pair(vision=False, **extra)[1]


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 300, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def run(model, ids, pieces, **given) -> torch.Tensor:
    cache, out, at = Cache(model.config.text), [], 0
    for n in pieces:
        part = {k: v[:, at : at + n] for k, v in given.items()}
        out.append(model(ids[:, at : at + n], cache=cache, **part))
        at += n
        for i, layer in enumerate(cache.layers):
            if model.config.text.is_local(i):
                bound = (
                    2 * ids.shape[0] * CHUNK * 2 * 16 * 4
                )  # k and v, rows, chunk, heads, d, fp32
                assert layer.nbytes <= bound
                assert layer.held < CHUNK
    assert cache.length == ids.shape[1]
    return torch.cat(out, 1)


def pieces_of(cuts: list[int]) -> list[int]:
    edges = [0, *sorted(set(cuts)), LENGTH]
    return [b - a for a, b in itertools.pairwise(edges)]


@torch.no_grad()
def test_one_token_at_a_time(ours, ids):
    torch.testing.assert_close(run(ours, ids, [1] * LENGTH), ours(ids), atol=2e-5, rtol=0)


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(1, LENGTH - 1), max_size=8))
@torch.no_grad()
def test_any_split_of_the_prefill(ours, ids, cuts):
    torch.testing.assert_close(run(ours, ids, pieces_of(cuts)), ours(ids), atol=2e-5, rtol=0)


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, LENGTH - 1), max_size=6), pad=st.integers(0, 20))
@torch.no_grad()
def test_rows_at_unequal_positions(ours, ids, cuts, pad):
    """A left-padded row beside a full one, in any split: each row as if alone."""
    short = ids[1, pad:]
    padded = ids.clone()
    padded[1] = F.pad(short, (pad, 0))
    column = torch.arange(LENGTH)
    positions = torch.stack([column, torch.where(column < pad, column, column - pad)])
    documents = torch.stack(
        [torch.zeros(LENGTH, dtype=torch.long), torch.where(column < pad, -1, 0)]
    )
    got = run(ours, padded, pieces_of(cuts), positions=positions, documents=documents)
    torch.testing.assert_close(got[0], ours(ids[:1])[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(got[1, pad:], ours(short[None])[0], atol=2e-5, rtol=0)


@torch.no_grad()
def test_images_only_in_the_prefill(make_pair, image_batch):
    reference, ours = make_pair(vision=True)
    ids, pixels = image_batch([[2], [1]], 26)
    want = reference(input_ids=ids, pixel_values=pixels).logits
    cache = Cache(ours.config.text)
    parts = [ours(ids[:, :17], pixels, cache=cache)]
    parts += [ours(ids[:, i : i + 1], cache=cache) for i in range(17, 26)]
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=2e-5, rtol=0)


@torch.no_grad()
def test_memory_of_local_layers_is_constant(make_pair):
    _, ours = make_pair(vision=False)
    cache = Cache(ours.config.text)
    sizes = []
    for _ in range(12):
        ours(torch.randint(3, 300, (1, 50)), cache=cache)
        sizes.append((cache.nbytes, cache.layers[0].nbytes, cache.layers[3].nbytes))
    one_chunk = 2 * CHUNK * 2 * 16 * 4
    assert max(local for _, local, _ in sizes) <= one_chunk
    assert sizes[-1][2] >= 2 * 600 * 2 * 16 * 4, "the global layer keeps everything"
    assert all(total == 3 * local + wide for total, local, wide in sizes)


@torch.no_grad()
def test_padding_behind_tokens_is_an_error(ours, ids):
    """Kept keys would have to reach across it, past the bound of one chunk."""
    positions = torch.arange(6).expand(2, 6)
    documents = torch.tensor([[0] * 6, [0, 0, 0, 0, -1, -1]])
    with pytest.raises(InputError, match="pad at the left"):
        ours(ids[:, :6], positions=positions, documents=documents, cache=Cache(ours.config.text))


@torch.no_grad()
def test_without_chunks_local_layers_keep_everything(make_pair, ids):
    """attention_chunk_size null (Llama Guard 4): RoPE layers see the whole document."""
    _, wide = make_pair(vision=False, attention_chunk_size=4096)
    free = replace(wide.config, text=replace(wide.config.text, attention_chunk_size=None))
    model = build(free)
    model.load_state_dict(wide.state_dict())
    want = wide(ids)
    torch.testing.assert_close(model(ids), want, atol=2e-5, rtol=0)
    places = dict(positions=torch.arange(LENGTH).expand(2, -1), documents=torch.zeros(2, LENGTH))
    torch.testing.assert_close(model(ids, **places), want, atol=2e-5, rtol=0)
    cache = Cache(free.text)
    parts = [model(ids[:, :11], cache=cache), model(ids[:, 11:12], cache=cache)]
    parts.append(model(ids[:, 12:], cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=2e-5, rtol=0)
    assert cache.layers[0].held == LENGTH
