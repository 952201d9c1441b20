"""Run: python -m pytest tests/guard/test_prune.py. A mixture of experts made dense, and Llama Guard's config."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Llama4ForConditionalGeneration

import herdling
from herdling.checkpoint import open_model
from herdling.errors import ConfigError
from herdling.guard.judges import ModelJudge, open_judge
from herdling.guard.prompt import answer, question
from herdling.guard.prune import dense, prune
from herdling.infer.draft_models import without_routed
from herdling.infer.lm import LM
from herdling.infer.request import Completion
from herdling.inputs import chat
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.model.llama import build, decoder_of


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train(["a few words to learn from", "safe unsafe unsafe"] * 3, 600)


def folder(path, tok, **text):
    vision = text.pop("vision", False)
    config = preset("nano", vision=vision, vocab_size=len(tok), **text)
    config = replace(
        config,
        image_token_index=tok.patch,
        boi_token_index=tok.special("<|image_start|>"),
        eoi_token_index=tok.special("<|image_end|>"),
    )
    model = initialize(build(config), seed=1, std=0.2).eval()
    herdling.save(LM(model, tok), path)
    return model


@pytest.mark.parametrize("step", [1, 2])
def test_it_is_the_mixture_without_its_routed_experts(tmp_path, tok, step):
    model = folder(tmp_path / "moe", tok, interleave_moe_layer_step=step)
    prune(tmp_path / "moe", tmp_path / "dense")
    made, config = open_model(tmp_path / "dense")
    assert config.text.moe_layers == ()
    ids = torch.randint(10, len(tok) - 10, (2, 40))
    wanted = without_routed(decoder_of(model))(ids)
    assert (wanted - model(ids)).abs().max() > 1e-2  # the experts did something
    torch.testing.assert_close(made(ids), wanted, rtol=1e-5, atol=1e-5)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(theirs(ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_pictures_and_side_files_stay(tmp_path, tok):
    folder(tmp_path / "moe", tok, vision=True)
    prune(tmp_path / "moe", tmp_path / "dense")
    lm = herdling.load(tmp_path / "dense")
    assert lm.processor is not None
    assert lm.generate(["a few"], max_tokens=3)[0].ids
    assert "prune" in (tmp_path / "dense" / "README.md").read_text()
    Llama4ForConditionalGeneration.from_pretrained(tmp_path / "dense")


def test_it_drafts_for_the_mixture(tmp_path, tok):
    folder(tmp_path / "moe", tok)
    prune(tmp_path / "moe", tmp_path / "dense")
    from herdling.infer.lm import load, open_draft

    lm = load(str(tmp_path / "moe"))
    plain = lm.generate(["a few words"], max_tokens=12)[0]
    drafted = herdling.infer.engine.Engine(
        lm.model, lm.tokenizer, drafter=open_draft(str(tmp_path / "dense"), lm)
    )
    [reply] = drafted.run([lm.request("a few words", max_tokens=12)])
    assert reply.ids == plain.ids


def test_there_is_nothing_to_prune_in_a_dense_model(tmp_path, tok):
    folder(tmp_path / "moe", tok)
    prune(tmp_path / "moe", tmp_path / "dense")
    with pytest.raises(ConfigError, match="no MoE layers"):
        prune(tmp_path / "dense", tmp_path / "again")


# Dense, RoPE everywhere, no chunks: what transformers' converter writes for a checkpoint without
# moe_args and nope_layer_interval, as Llama Guard 4's is.
GUARD_4 = dict(
    moe_layers=(),
    num_local_experts=0,
    interleave_moe_layer_step=0,
    no_rope_layers=None,
    no_rope_layer_interval=80,
    attention_chunk_size=None,
)


def test_a_folder_as_llama_guard_4_has_it(tmp_path, tok):
    model = folder(tmp_path / "guard", tok, **GUARD_4)
    file = tmp_path / "guard" / "config.json"
    raw = json.loads(file.read_text())
    raw.pop("layer_types")
    file.write_text(json.dumps(raw | {"attention_chunk_size": None, "no_rope_layers": []}))
    opened, config = open_model(tmp_path / "guard")
    assert all(config.text.is_local(i) for i in range(config.text.num_hidden_layers))
    assert config.text.attention_chunk_size is None
    ids = torch.randint(10, len(tok) - 10, (1, 90))
    torch.testing.assert_close(opened(ids), model(ids))
    # transformers cannot mask without a chunk size; one that never cuts is the same function.
    file.write_text(json.dumps(raw | {"attention_chunk_size": 4096}))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "guard").eval()
    torch.testing.assert_close(theirs(ids).logits, opened(ids), rtol=1e-4, atol=1e-4)


def test_a_guard_folder_is_asked_through_the_engine(tmp_path, tok):
    folder(tmp_path / "guard", tok, **GUARD_4)
    judge = open_judge(tmp_path / "guard")
    assert isinstance(judge, ModelJudge)
    talk = [{"role": "user", "content": "a few words"}]
    verdict = judge.judge(talk)
    rendered = chat.render(question(talk), judge.lm.tokenizer)
    assert judge.request(talk).ids == rendered.ids
    text = judge.lm.generate([rendered], max_tokens=32, temperature=0.0)[0].text
    assert (
        verdict.categories == answer(text).categories == ("unreadable",)
    )  # a toy speaks no verdict


@pytest.mark.parametrize("tell", ["safe", "unsafe\nS9"])
def test_the_score_is_the_first_answers_share(tmp_path, tok, tell):
    folder(tmp_path / "guard", tok, **GUARD_4)
    judge = open_judge(tmp_path / "guard")
    assert isinstance(judge, ModelJudge)
    safe, unsafe = (tok.encode(word)[0] for word in ("safe", "unsafe"))
    top = [(safe, math.log(0.3)), (unsafe, math.log(0.6))]
    ids = tok.encode(tell)
    done = Completion(tell, ids, "stop", 5, [-1.0] * len(ids), top=[top] * len(ids))
    verdict = judge.verdict(done)
    assert verdict.score == pytest.approx(0.6 / 0.9)
    assert verdict.categories == (("S9",) if "un" in tell else ())


def test_scout_pruned_has_llama_guards_size():
    config = dense(preset("scout", vision=True))
    with torch.device("meta"):
        model = build(config, device="meta")
    count = sum(p.numel() for p in model.parameters())
    assert 11.5e9 < count < 12.5e9
