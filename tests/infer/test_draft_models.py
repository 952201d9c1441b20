"""python -m pytest tests/infer/test_draft_models.py: whoever guesses, the reply stays the target's.

`decode` is the reference loop: draft, verify in one pass, accept, take back. 200 prompts; chunks of 4
positions, so that guesses are taken back over their boundaries in every reply.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from herdling.errors import ConfigError
from herdling.infer import draft_models, draft_native
from herdling.infer.draft_models import ModelDraft, SharedExpertDraft, without_routed
from herdling.infer.drafts import Drafter, FirstDraft, NgramDraft, Proposal
from herdling.infer.lm import LM
from herdling.infer.rewind import RewindCache
from herdling.infer.sampler import Sampler, Sampling
from herdling.infer.speculative import accept
from herdling.inputs.tokenizer import Tokenizer
from herdling.kernels import cpu
from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.model.llama import MoE, TextLM, build, decoder_of

DRAFTED, NEW = 3, 6


@torch.no_grad()
def decode(
    target: TextLM, drafter: Drafter, prompt: Sequence[int], sampler: Sampler, new: int = NEW
) -> tuple[list[int], int, int]:
    """The reply, the number of verifications, and of boundaries that were taken back."""
    cache, draft, ids = RewindCache(target.config.text, DRAFTED), drafter.begin(prompt), [*prompt]
    chunk, calls, crossed = target.config.text.attention_chunk_size or 1, 0, 0
    while len(ids) < len(prompt) + new:
        guess = draft.propose(min(DRAFTED, len(prompt) + new - len(ids) - 1), sampler)
        unread = [*ids[cache.length :], *guess.tokens]
        logits = target(torch.tensor([unread]), cache=cache)[0, -len(guess.tokens) - 1 :]
        tokens = accept(logits, guess.tokens, guess.q, sampler)
        draft.commit(tokens)
        ids += tokens
        crossed += cache.length // chunk > (len(ids) - 1) // chunk
        cache.rewind(len(ids) - 1)
        calls += 1
    return ids[len(prompt) :], calls, crossed


@pytest.fixture
def native_kernels() -> None:
    if not cpu.available():
        pytest.skip("no C++ compiler")


@pytest.fixture(scope="module")
def target(make_lm) -> LM:
    return make_lm(vision=False, attention_chunk_size=4)


def near(lm: LM, noise: float) -> LM:
    """The same model a little off: it guesses right often, but not always."""
    config = lm.config
    model = build(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), lm.model.parameters(), strict=True):
            off = torch.randn(mine.shape, generator=generator) * theirs.std() * noise
            mine.copy_(theirs + off)
    return LM(model.eval(), lm.tokenizer)


@pytest.fixture(scope="module")
def drafters(target) -> dict[str, Drafter]:
    draft = near(target, 0.02)
    lookup = NgramDraft(3, 1)
    pair = draft.model, draft.tokenizer, target.model, target.tokenizer
    model = ModelDraft(*pair)
    return {
        "ngram": lookup,
        "model": model,
        "sampled": ModelDraft(*pair, sampled=True),
        "shared": SharedExpertDraft(target.model),
        "first": FirstDraft(lookup, model),
    }


@pytest.fixture(scope="module")
def prompts(target) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 12, (200,), generator=generator).tolist()
    text = target.tokenizer.encode("the quick brown fox jumps over the lazy dog ") * 4
    parts = [text[n : 2 * n] for n in lengths]  # their beginnings come again, to be looked up
    return [[target.tokenizer.bos, *part, *part[:3]] for part in parts]


@pytest.fixture(scope="module")
def greedy(target, prompts) -> list[list[int]]:
    return [c.ids for c in target.generate(prompts, max_tokens=NEW, stop_ids=())]


@pytest.mark.parametrize("name", ["ngram", "model", "sampled", "shared"])
def test_greedy_replies_are_identical_whoever_guesses(target, drafters, prompts, greedy, name):
    calls = crossed = 0
    for prompt, want in zip(prompts, greedy, strict=True):
        got, n, over = decode(decoder_of(target.model), drafters[name], prompt, Sampler(Sampling()))
        assert got == want
        calls, crossed = calls + n, crossed + over
    assert crossed >= 10  # chunks were ended by guesses that had to go
    if name == "model":
        assert NEW * len(prompts) / calls > 1.5


@pytest.mark.parametrize("name", ["ngram", "model", "sampled", "shared", "first"])
def test_sampled_replies_repeat_with_their_seed(target, drafters, prompts, name):
    sampling = Sampling(temperature=0.8, top_p=0.95, frequency_penalty=0.5)

    def reply(seed: int) -> list[int]:
        return decode(decoder_of(target.model), drafters[name], prompts[3], Sampler(sampling, seed))[0]  # fmt: skip

    assert reply(1) == reply(1)
    assert len({tuple(reply(seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize("name", ["ngram", "model", "shared", "first"])
def test_certain_guesses_leave_sampled_replies_what_they_were(target, drafters, prompts, name):
    options = dict(temperature=0.8, top_k=50, repetition_penalty=1.3)
    plain = target.generate(prompts[:8], max_tokens=NEW, seed=4, stop_ids=(), **options)
    for prompt, want in zip(prompts, plain, strict=False):
        sampler = Sampler(Sampling(**options), 4)
        sampler.see(prompt)
        assert decode(decoder_of(target.model), drafters[name], prompt, sampler)[0] == want.ids


def test_a_perfect_draft_is_always_accepted_and_reads_no_token_twice(target, prompts):
    pair = target.model, target.tokenizer, target.model, target.tokenizer
    for temperature, sampled in ((0.0, False), (0.0, True), (1.0, True)):
        drafter = ModelDraft(*pair, sampled=sampled)
        assert drafter.cost == 1
        sampler = Sampler(Sampling(temperature), 3)
        _, calls, _ = decode(decoder_of(target.model), drafter, prompts[0], sampler, new=12)
        assert calls == 3  # of four tokens each


@pytest.mark.parametrize("name", ["model", "sampled", "shared"])
def test_whatever_was_guessed_wrong_a_draft_goes_on_like_a_fresh_one(target, drafters, name):
    generator, sampler = torch.Generator().manual_seed(3), Sampler(Sampling())
    ids = [target.tokenizer.bos, 40, 41]
    draft = drafters[name].begin(ids)
    for step in range(24):
        guess = draft.propose(1 + step % DRAFTED, sampler).tokens
        assert guess == drafters[name].begin(ids).propose(len(guess), sampler).tokens
        right = int(torch.randint(len(guess) + 1, (), generator=generator))
        tokens = [*guess[:right], int(torch.randint(40, 250, (), generator=generator))]
        draft.commit(tokens[: 1 + step % 4])  # also fewer than were agreed
        ids += tokens[: 1 + step % 4]


def test_proposals_follow_the_cuts_and_say_what_they_were_drawn_from(target, drafters):
    draft = drafters["sampled"].begin([target.tokenizer.bos, 5, 6])
    greedy = draft.propose(3, Sampler(Sampling()))
    assert greedy.q is None
    assert draft.propose(3, Sampler(Sampling())) == greedy  # nothing was committed in between
    guess = draft.propose(3, Sampler(Sampling(temperature=1.0, top_k=2)))
    assert guess.q is not None
    assert guess.q.shape == (3, target.config.text.vocab_size)
    assert ((guess.q > 0).sum(1) == 2).all()
    assert all(row[token] > 0 for row, token in zip(guess.q, guess.tokens, strict=True))


@pytest.mark.parametrize("name", ["model", "sampled"])
def test_a_draft_far_behind_catches_up_piece_by_piece(target, drafters, monkeypatch, name):
    for module in (draft_models, draft_native):
        monkeypatch.setattr(module, "PIECE", 4)
    ids, sampler = [target.tokenizer.bos, *range(40, 50)], Sampler(Sampling())
    late = drafters[name].begin(ids)
    assert [late.propose(2, sampler) for _ in range(2)] == [Proposal([])] * 2
    late_guess = late.propose(2, sampler)
    monkeypatch.undo()
    assert late_guess.tokens
    assert late_guess == drafters[name].begin(ids).propose(2, sampler)


def test_nothing_is_proposed_beyond_the_drafts_context(target):
    text = replace(target.config.text, max_position_embeddings=8)
    short = LM(initialize(build(replace(target.config, text=text)), 0).eval(), target.tokenizer)
    drafter = ModelDraft(short.model, short.tokenizer, target.model, target.tokenizer)
    draft, sampler = drafter.begin([1] * 6), Sampler(Sampling())
    assert len(draft.propose(4, sampler).tokens) == 2
    draft.commit([1] * 3)
    assert draft.propose(4, sampler).tokens == []
    assert draft.nbytes > 0


def test_without_routed_experts_is_the_model_with_gates_closed_over_the_same_weights(target):
    model = decoder_of(target.model)
    view, ids = without_routed(model), torch.tensor([[1, 2, 3, 4, 5, 6]])
    assert {id(p) for p in view.parameters()} < {id(p) for p in model.parameters()}
    closed = build(target.config)
    closed.load_state_dict(target.model.state_dict())
    for module in closed.modules():
        if isinstance(module, MoE):
            torch.nn.init.zeros_(module.experts.down_proj)
    with torch.no_grad():
        torch.testing.assert_close(view(ids), closed(ids))
        before = model(ids)
        model.model.layers[0].feed_forward.shared_expert.up_proj.weight.mul_(1.5)
        changed = view(ids)
        model.model.layers[0].feed_forward.shared_expert.up_proj.weight.div_(1.5)
        torch.testing.assert_close(model(ids), before)
    assert not torch.allclose(changed, closed(ids))


def test_drafts_with_weights_to_be_trained_are_native_too(target, native_kernels):
    draft = near(target, 0.02)
    assert next(draft.model.parameters()).requires_grad
    drafter = ModelDraft(draft.model, draft.tokenizer, target.model, target.tokenizer)
    assert isinstance(drafter.begin([1, 2]), draft_native.NativeGuess)


def test_other_tokens_are_refused(target, tok):
    def lm_of(tokenizer: Tokenizer, size: int) -> LM:
        return LM(build(preset("nano", vision=False, vocab_size=size)), tokenizer)

    larger = lm_of(tok, len(tok) + 8)
    other = Tokenizer.train(["entirely different words make different merges " * 9], len(tok))
    assert len(other) <= len(tok)
    for draft, complaint in (
        (larger, f"vocab_size is {len(tok) + 8}, the target's {len(tok)}"),
        (lm_of(other, len(tok)), "needs the target's tokenizer"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            ModelDraft(draft.model, draft.tokenizer, target.model, target.tokenizer)
