"""Several steps in one call against the plain model, token by token, whatever the layers.

Run: python -m pytest tests/kernels/cpu/test_guess.py
"""

import pytest
import torch

from herdling.errors import InputError
from herdling.infer.draft_native import NativeDrafts
from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.model.llama import TextLM, build

CHUNK = 8
SHAPES = {
    "moe": {},
    "dense": dict(interleave_moe_layer_step=0),
    "one local layer": dict(interleave_moe_layer_step=0, num_hidden_layers=1),
    "no chunks": dict(attention_chunk_size=None),
    "global only": dict(num_hidden_layers=1, no_rope_layers=(0,)),
    "top 2, no norm": dict(num_experts_per_tok=2, use_qk_norm=False),
}


@pytest.fixture(autouse=True)
def _no_grad(native):
    with torch.no_grad():
        yield


def make(dtype: torch.dtype = torch.float32, **changes) -> TextLM:
    own = dict(
        attention_chunk_size=CHUNK, vocab_size=64, floor_scale=4, max_position_embeddings=200
    )
    model = build(preset("nano", vision=False, **{**own, **changes}))
    initialize(model, 0)
    for parameter in model.parameters():
        parameter.mul_(3)
    assert isinstance(model, TextLM)
    return model.to(dtype)


def plainly(model: TextLM, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(ids) - count :]


@pytest.mark.parametrize("shape", SHAPES)
def test_guesses_are_the_plain_models_over_chunks_and_for_several_sequences(shape):
    model = make(**SHAPES[shape])
    drafts = NativeDrafts(model, longest=6)
    assert drafts.fits
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 64, (n,), generator=generator).tolist() for n in (1, 7, 8, 13)]
    guesses = [drafts.begin(text) for text in texts]
    for step in range(8):  # past two boundaries, with guesses taken back in between
        counts = [(step + i) % 6 + 1 for i in range(4)]
        found = drafts.propose(list(zip(guesses, counts, strict=True)))
        for i, proposal in enumerate(found):
            assert proposal.tokens == plainly(model, texts[i], counts[i])
            right = min(step % 4, counts[i])
            tokens = [*proposal.tokens[:right], int(torch.randint(0, 64, (), generator=generator))]
            guesses[i].commit(tokens)
            texts[i] += tokens


def test_bfloat16_reads_what_float32_reads_up_to_rounding():
    wide = make()
    narrow = make(torch.bfloat16)
    ids = torch.randint(0, 64, (12,), generator=torch.Generator().manual_seed(1)).tolist()
    one = NativeDrafts(narrow, longest=1)
    (proposal,) = one.propose([(one.begin(ids), 1)])
    logits = wide(torch.tensor([ids]))[0, -1]
    assert logits.max() - logits[proposal.tokens[0]] < 0.05 * (logits.max() - logits.min())


def test_pages_go_back_and_their_lack_only_silences():
    model = make()
    store = NativeDrafts(model, 4).memory([1]).nbytes
    assert store == 0
    drafts = NativeDrafts(model, 4, memory=2**17)
    pages = drafts._opened()[1]
    free = pages.available
    first = drafts.begin([1] * 30)
    (proposal,) = drafts.propose([(first, 4)])
    assert proposal.tokens == plainly(model, [1] * 30, 4)
    assert first.nbytes > 0
    taken = [drafts.begin([1] * 60) for _ in range(12)]
    found = drafts.propose([(guess, 4) for guess in taken])
    assert any(not p.tokens for p in found)
    assert any(p.tokens for p in found)
    del first, taken, found
    assert pages.available == free


def test_changed_weights_are_followed():
    model = make()
    drafts = NativeDrafts(model, 3)
    drafts.propose([(drafts.begin([1, 2, 3]), 3)])
    for parameter in model.parameters():
        parameter.data = parameter.data.roll(1, 0).clone()
    assert drafts.propose([(drafts.begin([1, 2, 3]), 3)])[0].tokens == plainly(model, [1, 2, 3], 3)


def test_tokens_outside_the_vocabulary_are_refused():
    drafts = NativeDrafts(make(), 3)
    with pytest.raises(InputError, match="outside the vocabulary"):
        drafts.propose([(drafts.begin([1, 64]), 2)])
