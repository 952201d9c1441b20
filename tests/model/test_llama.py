"""The model against transformers on random non-zero weights: logits to 2e-5, gradients to 1e-4.

python -m pytest tests/model/test_llama.py
"""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama4.modeling_llama4 import Llama4TextRotaryEmbedding

from herdling.errors import InputError
from herdling.kernels.cross_entropy import weighted_nll
from herdling.model.config import ModelConfig
from herdling.model.llama import Attention, rope_frequencies

CHUNK = 8
PLAIN = {"rope_type": "default", "rope_theta": 500000.0}
MAVERICK = dict(interleave_moe_layer_step=2, use_qk_norm=False, rope_parameters=PLAIN)
VARIANTS = {
    "scout": {},
    "maverick": MAVERICK,
    "scout-top2": dict(num_experts_per_tok=2),
    "maverick-top2": {**MAVERICK, "num_experts_per_tok": 2},
    "explicit-moe-layers": dict(moe_layers=[0, 3]),
    "dense": dict(moe_layers=[]),
    "no-groups": dict(num_key_value_heads=4),
    "one-kv-head": dict(num_key_value_heads=1),
    "floor-1": dict(floor_scale=1),
    "no-tuning": dict(attn_temperature_tuning=False),
    "wide-chunk": dict(attention_chunk_size=64),
    "many-experts": dict(num_local_experts=16),
}
LENGTHS = (CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 1)


def ids_of(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, make_pair):
    return make_pair(vision=False, **VARIANTS[request.param])


@torch.no_grad()
def test_logits_equal_transformers_at_every_length(pair):
    reference, ours = pair
    for length in LENGTHS:
        ids = ids_of(2, length)
        torch.testing.assert_close(ours(ids), reference(ids).logits, atol=2e-5, rtol=0)


def test_gradients_equal_transformers(pair):
    reference, ours = pair
    ids = ids_of(2, 3 * CHUNK + 1)
    assert_gradients_match(reference, ours, ids, None)


def assert_gradients_match(reference, ours, ids, pixels):
    """Relative per tensor: 1e-4 of the largest entry of that tensor's gradient."""
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    weights = (labels != -100).float() / (labels != -100).sum()
    reference.zero_grad()
    ours.zero_grad()
    extra = {} if pixels is None else {"pixel_values": pixels}
    F.cross_entropy(reference(ids, **extra).logits.flatten(0, 1), labels.flatten()).backward()
    ours(ids, readout=lambda h, head: weighted_nll(h, head, labels, weights), **extra).backward()
    expected = {n: p.grad for n, p in reference.named_parameters()}
    seen = 0
    for name, parameter in ours.named_parameters():
        want, got = expected[name], parameter.grad
        if want is None or not want.any():
            assert got is None or not got.any(), name
            continue
        scale = want.abs().max()
        assert (got - want).abs().max() <= 1e-4 * scale, (name, (got - want).abs().max() / scale)
        seen += 1
    assert seen > 0.8 * len(expected), "most parameters must have a gradient for this to mean much"


IMAGES = {
    "one tile": [[1], [1]],
    "many tiles": [[5], [2]],
    "several images": [[1, 3], [2, 1]],
    "text-only row beside an image row": [[], [3]],
    "image row beside a text-only row": [[2], []],
}


@pytest.mark.parametrize("rows", IMAGES.values(), ids=IMAGES.keys())
@pytest.mark.parametrize("variant", ["scout", "maverick", "scout-top2"])
def test_images_equal_transformers(make_pair, image_batch, rows, variant):
    reference, ours = make_pair(vision=True, **VARIANTS[variant])
    ids, pixels = image_batch(rows, 40)
    with torch.no_grad():
        want = reference(input_ids=ids, pixel_values=pixels).logits
        torch.testing.assert_close(ours(ids, pixels), want, atol=2e-5, rtol=0)
        assert (ours(ids, pixels.flip(0)) - want).abs().max() > 1e-3 or len(pixels) == 1
    assert_gradients_match(reference, ours, ids, pixels)


def test_text_through_a_multimodal_model(make_pair):
    reference, ours = make_pair(vision=True)
    ids = ids_of(2, 19)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), reference(input_ids=ids).logits, atol=2e-5, rtol=0)


def test_patches_and_tiles_must_match(make_pair, image_batch):
    _, ours = make_pair(vision=True)
    ids, pixels = image_batch([[2]], 20)
    with pytest.raises(InputError, match="8 patch tokens for 1 tiles of 4"):
        ours(ids, pixels[:1])


def test_text_model_refuses_images(make_pair):
    _, ours = make_pair(vision=False)
    with pytest.raises(InputError, match="text-only"):
        ours(ids_of(1, 4), torch.zeros(1, 3, 56, 56))


def pack(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    return positions, documents


@pytest.fixture(params=["segments", "masks"])
def packed_way(request, monkeypatch):
    """Rows taken apart, as on a CPU, and masks, as elsewhere."""
    if request.param == "masks":
        monkeypatch.setattr("herdling.model.llama.find_segments", lambda *_: None)


@pytest.mark.usefixtures("packed_way")
@pytest.mark.parametrize("variant", ["scout", "maverick", "scout-top2"])
@torch.no_grad()
def test_packed_documents_equal_documents_alone(make_pair, variant):
    """Exact where transformers is not: its temperature counts the row, not the document."""
    reference, ours = make_pair(vision=False, **VARIANTS[variant])
    lengths = [5, 2 * CHUNK + 3, 1, CHUNK, CHUNK + 1]
    documents = [ids_of(1, n, seed) for seed, n in enumerate(lengths)]
    positions, ids = pack(lengths)
    packed = ours(torch.cat(documents, 1), positions=positions, documents=ids)
    alone = torch.cat([ours(d) for d in documents], 1)
    oracle = torch.cat([reference(d).logits for d in documents], 1)
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=0)
    torch.testing.assert_close(packed, oracle, atol=2e-5, rtol=0)


@torch.no_grad()
def test_packing_equals_transformers_where_it_is_right(make_pair):
    """Without tuning transformers isolates documents by restarting position ids."""
    reference, ours = make_pair(vision=False, attn_temperature_tuning=False)
    positions, documents = pack([11, 2 * CHUNK, 6])
    ids = ids_of(1, positions.shape[1])
    want = reference(ids, position_ids=positions, use_cache=False).logits
    got = ours(ids, positions=positions, documents=documents)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


@pytest.mark.usefixtures("packed_way")
@pytest.mark.parametrize("variant", ["scout", "maverick-top2"])
def test_gradients_of_packed_and_padded_rows(make_pair, variant):
    """The path all training takes: gradients of one packed row are the sum over documents alone."""
    reference, ours = make_pair(vision=False, **VARIANTS[variant])
    lengths = [5, 2 * CHUNK + 3, CHUNK + 1]
    documents = [ids_of(1, n, seed) for seed, n in enumerate(lengths)]
    positions, at = pack([*lengths, 4])
    at[0, -4:] = -1  # padding, which asks for nothing
    packed = torch.cat([*documents, torch.zeros(1, 4, dtype=torch.long)], 1)

    def loss(logits, ids):
        return F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")

    reference.zero_grad()
    for ids in documents:
        loss(reference(ids).logits, ids).backward()
    ours.zero_grad()
    labels = torch.cat([F.pad(d[:, 1:], (0, 1), value=-100) for d in documents], 1)
    labels = F.pad(labels, (0, 4), value=-100)
    weights = (labels != -100).float()
    ours(
        packed,
        positions=positions,
        documents=at,
        readout=lambda h, head: weighted_nll(h, head, labels, weights),
    ).backward()
    for (name, want), (_, got) in zip(
        sorted(reference.named_parameters()), sorted(ours.named_parameters()), strict=True
    ):
        if want.grad is not None and want.grad.any():
            assert (got.grad - want.grad).abs().max() <= 1e-4 * want.grad.abs().max(), name


@torch.no_grad()
def test_packed_documents_with_pictures_equal_documents_alone(make_pair, image_batch):
    """Tiles go to their own document, in row order."""
    _, ours = make_pair(vision=True)
    first, pixels = image_batch([[2], [1]], 20)
    alone = [ours(first[:1], pixels[:2]), ours(first[1:], pixels[2:])]
    positions, documents = pack([20, 20])
    row = torch.cat([first[:1], first[1:]], 1)
    got = ours(row, pixels, positions=positions, documents=documents)
    torch.testing.assert_close(got, torch.cat(alone, 1), atol=2e-5, rtol=0)
    swapped = ours(row, pixels[[2, 1, 0]], positions=positions, documents=documents)
    assert (swapped - got).abs().max() > 1e-3


def test_positions_and_documents_come_together(make_pair):
    _, ours = make_pair(vision=False)
    ids, at = ids_of(1, 6), torch.arange(6)[None]
    with pytest.raises(InputError, match="positions given alone"):
        ours(ids, positions=at)
    with pytest.raises(InputError, match="documents given alone"):
        ours(ids, documents=torch.zeros_like(at))


def left_pad(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, positions, documents (B, T): padding is a document of its own."""
    width = max(r.shape[0] for r in rows)
    ids = torch.stack([F.pad(r, (width - r.shape[0], 0)) for r in rows])
    pads = torch.tensor([width - r.shape[0] for r in rows])[:, None]
    column = torch.arange(width)[None]
    padding = column < pads
    return ids, torch.where(padding, column, column - pads), torch.where(padding, -1, 0)


@torch.no_grad()
def test_left_padding_never_changes_a_row(make_pair):
    _, ours = make_pair(vision=False)
    rows = [ids_of(1, n, n)[0] for n in (3, 21, CHUNK, 17)]
    ids, positions, documents = left_pad(rows)
    out = ours(ids, positions=positions, documents=documents)
    for row, logits in zip(rows, out, strict=True):
        torch.testing.assert_close(logits[-len(row) :], ours(row[None])[0], atol=2e-5, rtol=0)


@torch.no_grad()
def test_left_padding_equals_transformers_where_it_is_right(make_pair):
    reference, ours = make_pair(vision=False, attn_temperature_tuning=False)
    rows = [ids_of(1, n, n)[0] for n in (3, 21, CHUNK)]
    ids, positions, documents = left_pad(rows)
    mask = (documents >= 0).long()
    want = reference(ids, attention_mask=mask, position_ids=positions * mask).logits
    got = ours(ids, positions=positions, documents=documents)
    real = documents >= 0
    torch.testing.assert_close(got[real], want[real], atol=2e-5, rtol=0)


@torch.no_grad()
def test_one_switch_at_a_time_matters(make_pair):
    """Negative controls: each feature under parity above changes the logits when it is off."""
    reference, _ = make_pair(vision=False)
    ids = ids_of(1, 3 * CHUNK + 1)
    want = reference(ids).logits
    for off in (dict(attention_chunk_size=64), dict(attn_temperature_tuning=False),
                dict(use_qk_norm=False), dict(rope_parameters=PLAIN), dict(floor_scale=5)):  # fmt: skip
        _, ours = make_pair(vision=False, **off)
        ours.load_state_dict(reference.state_dict())
        assert (ours(ids) - want).abs().max() > 1e-3, off


@pytest.mark.filterwarnings("ignore:rope scaling is 8/4")
@pytest.mark.parametrize("scaling", [(8.0, 1.0, 4.0), (16.0, 1.0, 1.0), None])
def test_rope_table_is_bit_equal(scaling, make_pair):
    rope = dict(PLAIN)
    if scaling:
        factor, low, high = scaling
        rope |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": low,
                 "high_freq_factor": high, "original_max_position_embeddings": 8192}  # fmt: skip
    reference, _ = make_pair(vision=False, rope_parameters=rope, head_dim=128)
    want = Llama4TextRotaryEmbedding(reference.config).inv_freq
    config = ModelConfig.from_hf(reference.config.to_dict()).text
    got = rope_frequencies(config, torch.device("cpu"))
    assert torch.equal(got, want)
    if scaling == (16.0, 1.0, 1.0):  # pair 35 is the first scaled one (spec 2.2)
        plain = 1.0 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
        assert (got / plain < 0.5).nonzero()[0].item() == 35


def test_half_precision_stays_near_float32(make_pair, image_batch):
    """bf16 and fp16 are sanity checks: both reference codes differ from fp32 by 1-2 % of the norm."""
    _, ours = make_pair(vision=True)
    ids, pixels = image_batch([[2], [1]], 25)
    with torch.no_grad():
        want = ours(ids, pixels)
        for dtype in (torch.bfloat16, torch.float16):
            ours.to(dtype)
            got = ours(ids, pixels)
            assert got.dtype == torch.float32
            # The median token: a router logit that rounds to a tie sends its token elsewhere.
            assert ((got - want).norm(dim=-1) / want.norm(dim=-1)).median() < 0.04
            ours.float()


def test_autocast_trains(make_pair, image_batch):
    """bf16 products over float32 weights: gradients come in float32, for experts and pictures too."""
    _, ours = make_pair(vision=True)
    ids, pixels = image_batch([[2], [1]], 25)
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    weights = (labels != -100).float() / 48
    watched = {
        n: p
        for n, p in ours.named_parameters()
        if n.endswith(("layers.0.feed_forward.experts.gate_up_proj", "lm_head.weight", "patch_embedding.linear.weight"))
    }  # fmt: skip
    assert len(watched) == 3

    def loss() -> torch.Tensor:
        ours.zero_grad()
        return ours(ids, pixels, readout=lambda h, head: weighted_nll(h, head, labels, weights))

    full = loss()
    full.backward()
    want = {n: p.grad.clone() for n, p in watched.items()}
    with torch.autocast("cpu", torch.bfloat16):
        low = loss()
    low.backward()
    assert abs(low.item() - full.item()) < 0.05 * full.item()
    for name, parameter in watched.items():
        assert parameter.grad.dtype == torch.float32
        assert F.cosine_similarity(parameter.grad.flatten(), want[name].flatten(), 0) > 0.95, name


def test_only_local_layers_are_normed(make_pair):
    _, ours = make_pair(vision=False)
    layers = [m for m in ours.modules() if isinstance(m, Attention)]
    assert [layer.qk_norm for layer in layers] == [True, True, True, False]
