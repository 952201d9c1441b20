"""Cached decoding equals the full forward for any split, and local layers stay within one chunk."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from herdling.model.cache import Cache

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
