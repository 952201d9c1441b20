"""python -m pytest tests/infer/test_rewind.py: guessed and taken back is as if never guessed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herdling.errors import InputError
from herdling.infer.rewind import RewindCache
from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.model.llama import LanguageModel, build

CHUNK, SLACK = 4, 5


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    config = preset("nano", vision=False, vocab_size=64, attention_chunk_size=CHUNK)
    return initialize(build(config), seed=1, std=0.12).eval()


@settings(max_examples=40, deadline=None)
@given(
    calls=st.lists(st.tuples(st.integers(1, 11), st.integers(0, SLACK)), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
def test_any_calls_and_rewinds_give_the_logits_of_the_plain_forward(model, calls, seed):
    generator = torch.Generator().manual_seed(seed)
    cache, text = RewindCache(model.config.text, SLACK), []
    for new, back in calls:
        fresh = torch.randint(0, 64, (new,), generator=generator).tolist()
        with torch.no_grad():
            got = model(torch.tensor([fresh]), cache=cache)[0]
            want = model(torch.tensor([text + fresh]))[0, len(text) :]
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
        text += fresh
        back = min(back, len(text), len(fresh))
        cache.rewind(len(text) - back)
        text = text[: len(text) - back]
        assert cache.length == len(text)


def test_local_layers_stay_small_however_long_the_text(model):
    cache, sizes = RewindCache(model.config.text, SLACK), []
    for _ in range(60):
        with torch.no_grad():
            model(torch.zeros(1, 3, dtype=torch.int64), cache=cache)
        sizes.append([layer.nbytes for layer in cache.layers])
        assert all(layer.held < CHUNK + SLACK + 3 for layer in cache.layers[:3])
    assert sizes[-1][:3] == sizes[10][:3]
    assert sizes[-1][3] > sizes[10][3]  # the global layer


def test_more_than_the_slack_is_refused(model):
    cache = RewindCache(model.config.text, SLACK)
    with torch.no_grad():
        model(torch.zeros(1, 20, dtype=torch.int64), cache=cache)
    cache.rewind(17)
    for length in (14, 18, -1):
        with pytest.raises(InputError, match="cannot take back"):
            cache.rewind(length)
    cache.rewind(15)
    with pytest.raises(InputError, match="padding or packing"):
        cache.record(torch.zeros(1, 1), torch.zeros(1, 1))
