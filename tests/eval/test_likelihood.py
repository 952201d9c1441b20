"""Bits per byte equal the plain forward's, however examples are batched; baselines by hand."""

import gzip
import math

import pytest
import torch
from PIL import Image

from herdling.data.sources import Example
from herdling.errors import InputError
from herdling.eval.likelihood import likelihood


def text_example(tok, text: str, domain: str = "prose") -> Example:
    tokens = [tok.bos, *tok.encode(text), tok.end_of_text]
    return Example(tokens, [True] * len(tokens), None, domain)


def answer_example(lm, answer: str, domain: str = "pictures") -> Example:
    parts = [{"type": "image", "image": Image.new("RGB", (32, 32), answer)},
             {"type": "text", "text": "which colour?"}]  # fmt: skip
    prompt = lm.render([{"role": "user", "content": parts}])
    reply = [*lm.tokenizer.encode(answer), lm.tokenizer.eot]
    mask = [False] * len(prompt.ids) + [True] * len(reply)
    return Example(prompt.ids + reply, mask, prompt.tiles[0].pixel_values, domain)


def nats_by_hand(lm, example: Example) -> float:
    """Loss of the wanted tokens that are text, by the plain forward."""
    ids = torch.tensor([example.tokens])
    logprobs = lm.logits(ids, example.tiles)[0].log_softmax(-1)
    control = set(lm.tokenizer.specials.values())
    return -sum(
        logprobs[i - 1, token].item()
        for i, token in enumerate(example.tokens)
        if i and example.loss_mask[i] and token not in control
    )


TEXTS = ["how many shapes", "which number is in the picture? " * 3, "a", "42 \u00e9\U0001f411"]


@pytest.mark.parametrize("batch_tokens", [1, 60, 8192])
def test_domains_and_images_against_the_plain_forward(lm, batch_tokens):
    examples = [text_example(lm.tokenizer, text) for text in TEXTS]
    examples += [answer_example(lm, colour) for colour in ("red", "green")]
    results = likelihood(lm, examples, batch_tokens)
    assert list(results) == ["pictures", "prose"]
    for domain, text in (("prose", "".join(TEXTS)), ("pictures", "redgreen")):
        own = [e for e in examples if e.domain == domain]
        nats = sum(nats_by_hand(lm, e) for e in own)
        size = len(text.encode())
        assert results[domain].bytes == size
        assert results[domain].bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
        assert results[domain].loss == pytest.approx(nats / results[domain].tokens, rel=1e-5)


def test_baselines_see_the_scored_bytes(lm):
    tok = lm.tokenizer
    text = "how many shapes are there? " * 40
    result = likelihood(lm, [text_example(tok, text)])["prose"]
    assert result.baselines["gzip"] == 8 * len(gzip.compress(text.encode(), 9)) / len(text)
    assert result.baselines["lzma"] < 1.5
    ids = tok.encode(text)
    entropy = -sum(math.log2(ids.count(i) / len(ids)) for i in ids)
    assert result.baselines["unigram"] == pytest.approx(entropy / len(text))
    assert result.tokens == len(ids)


@pytest.mark.parametrize(("context", "length"), [(16, None), (64, 16)])
def test_long_texts_are_scored_in_windows(make_lm, context, length):
    lm = make_lm(max_position_embeddings=context)
    long = text_example(lm.tokenizer, "abcdefgh" * 6)
    got = likelihood(lm, [long], length=length)["prose"]
    nats = 0.0
    for at in range(0, len(long.tokens), 16):
        labels = long.tokens[at + 1 : at + 17]
        logprobs = lm.logits([long.tokens[at : at + 16]])[0].log_softmax(-1)
        control = set(lm.tokenizer.specials.values())
        nats -= sum(logprobs[i, t].item() for i, t in enumerate(labels) if t not in control)
    assert got.bytes == 48
    assert got.bits_per_byte == pytest.approx(nats / math.log(2) / 48, rel=1e-5)


def test_what_cannot_be_scored_is_said(lm, make_lm):
    with pytest.raises(InputError, match="prose: no text to predict"):
        likelihood(lm, [text_example(lm.tokenizer, "")])
    with pytest.raises(InputError, match=r"an example with images has \d+ tokens; .* is 16"):
        likelihood(make_lm(max_position_embeddings=16), [answer_example(lm, "red")])
    with pytest.raises(InputError, match="length is 17; it must be 1 to 16"):
        likelihood(make_lm(max_position_embeddings=16), [], length=17)
    with pytest.raises(InputError, match="length is 0"):
        likelihood(lm, [], length=0)
    assert likelihood(lm, []) == {}
