"""Run: python -m pytest tests/infer/test_beams.py. Against transformers' own beam search."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import herdling
from herdling.errors import ConfigError, InputError
from herdling.infer.beams import search


@pytest.fixture(scope="module")
def text_lm(make_lm):
    return make_lm(vision=False)


@pytest.fixture(scope="module")
def reference(text_lm, tmp_path_factory):
    """transformers' Llama4ForCausalLM with the same weights, from a saved folder."""
    folder = tmp_path_factory.mktemp("beams") / "model"
    herdling.save(text_lm, folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def prompt(lm, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(200, (5 + 4 * seed,), generator=generator).tolist()


def stops(lm, ids: list[int]) -> list[int]:
    """Tokens of the middle of good replies, so that beams end at different lengths."""
    free = lm.beams(ids, 4, max_tokens=14, stop_ids=())
    return sorted({free[0].ids[10], free[1].ids[6], free[-1].ids[8]})


@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0])
@pytest.mark.parametrize("beams", [1, 2, 4])
@pytest.mark.parametrize("seed", [0, 1, 3])
def test_the_replies_of_transformers(text_lm, reference, seed, beams, penalty):
    ids = prompt(text_lm, seed)
    ends = stops(text_lm, ids)
    found = text_lm.beams(ids, beams, penalty, max_tokens=14, stop_ids=ends)
    if beams == 1:  # which transformers takes for greedy decoding
        want = text_lm.generate([ids], max_tokens=14, stop_ids=ends)[0]
        assert list(found[0].ids) == want.ids
        return
    given = torch.tensor([ids])
    with torch.inference_mode():
        want = reference.generate(
            given, attention_mask=torch.ones_like(given), num_beams=beams, do_sample=False,
            max_new_tokens=14, eos_token_id=ends, pad_token_id=1, length_penalty=penalty,
            num_return_sequences=beams, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    for beam, row, score in zip(found, want.sequences, want.sequences_scores, strict=True):
        new = row[len(ids) :].tolist()
        assert list(beam.ids) == new[: len(beam.ids)]
        assert set(new[len(beam.ids) :]) <= {1}  # padding
        assert beam.score == pytest.approx(float(score), abs=2e-4)
        assert (beam.finish_reason == "stop") == (beam.ids[-1] in ends)


def test_ends_are_of_both_kinds(text_lm):
    reasons = set()
    for seed in (0, 1, 3):
        ids = prompt(text_lm, seed)
        beams = text_lm.beams(ids, 4, max_tokens=14, stop_ids=stops(text_lm, ids))
        reasons |= {(beam.finish_reason, len(beam.ids)) for beam in beams}
    assert len(reasons) > 2
    assert {reason for reason, _ in reasons} == {"stop", "length"}


def test_more_beams_find_likelier_replies(text_lm):
    ids = prompt(text_lm, 2)
    one, many = (text_lm.beams(ids, n, 0.0, max_tokens=10, stop_ids=()) for n in (1, 12))
    assert many[0].score > one[0].score + 1e-3
    total = text_lm.logits([[*ids, *many[0].ids]])[0].log_softmax(-1)
    places = range(len(ids) - 1, len(ids) + 9)
    told = sum(float(total[at, token]) for at, token in zip(places, many[0].ids, strict=True))
    assert many[0].total == pytest.approx(told, abs=1e-4)


def test_a_beam_computes_what_is_new_and_not_the_prompt(text_lm):
    engine = text_lm.engine
    ids = prompt(text_lm, 3) * 6
    before = engine.stats()
    text_lm.beams(ids, 3, max_tokens=8, stop_ids=())
    after = engine.stats()
    read = after.prompt_tokens - before.prompt_tokens - (after.cached_tokens - before.cached_tokens)
    assert read < len(ids) + 22 * 3 * engine._ready().runner.store.layers.global_tokens


def test_what_beams_cannot_do_is_refused(text_lm):
    for options in ({"temperature": 1.0}, {"stop": "x"}, {"repetition_penalty": 1.2}):
        with pytest.raises(InputError, match="beam search"):
            text_lm.beams([1, 2], 2, **options)
    with pytest.raises(ConfigError, match="beams"):
        search(text_lm.engine, text_lm.request([1, 2]), 0)
    with pytest.raises(ConfigError, match="alternatives"):
        search(text_lm.engine, text_lm.request([1, 2]), 99)
