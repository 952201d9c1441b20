"""What is saved opens in plain transformers with the standard class, and is written whole or not.

Run: python -m pytest tests/checkpoint/test_save.py
"""

import json
import os

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    GenerationConfig,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
)

from herdling.checkpoint import Card, open_model, save_model
from herdling.checkpoint.folder import INDEX, SINGLE
from herdling.checkpoint.save import check_target
from herdling.errors import CheckpointError, ConfigError
from herdling.inputs.image_processor import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.config import preset

CARD = Card("toy")
TOLERANCE = 2e-5  # both sides float32 on the same machine; the parity bound of the model itself


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    texts = ["the quick brown fox jumps over the lazy dog", "def add(a, b): return a + b"] * 20
    return Tokenizer.train(texts, vocab_size=320)


@pytest.mark.parametrize("shard_bytes", [4 * 10**9, 300_000])
def test_plain_transformers_opens_it_with_the_same_logits(toy, tmp_path, random_model, shard_bytes):
    model = random_model(toy)
    save_model(model, toy, tmp_path / "m", card=CARD, shard_bytes=shard_bytes)
    kind = Llama4ForConditionalGeneration if toy.vision else Llama4ForCausalLM
    theirs, report = kind.from_pretrained(
        tmp_path / "m", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, 317, (2, 70), generator=torch.Generator().manual_seed(1))
    pixels = {}
    if toy.vision:
        ids[0, 3 : 3 + 2 * toy.vision.tokens_per_tile] = toy.image_token_index
        tiles = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        pixels = {"pixel_values": tiles}
    with torch.no_grad():
        expected = theirs(input_ids=ids, **pixels).logits
        torch.testing.assert_close(model(ids, **pixels), expected, rtol=0, atol=TOLERANCE)
    assert expected.abs().max() > 0.1


def test_what_transformers_saves_opens_here(toy, tmp_path, random_model):
    model = random_model(toy)
    save_model(model, toy, tmp_path / "m", card=CARD)
    kind = Llama4ForConditionalGeneration if toy.vision else Llama4ForCausalLM
    kind.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "t", max_shard_size="300KB")
    again, config = open_model(tmp_path / "t")
    assert config == toy
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_shards_hold_no_more_than_asked_and_are_numbered(tmp_path, random_model):
    config = preset("nano", vision=False, vocab_size=320)
    model = random_model(config)
    save_model(model, config, tmp_path / "m", card=CARD, shard_bytes=400_000)
    files = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for name in files:
        with safe_open(tmp_path / "m" / name, "pt") as shard:
            assert shard.metadata()["format"] == "pt"
            assert sum(shard.get_tensor(key).nbytes for key in shard.keys()) <= 400_000  # noqa: SIM118


def test_one_tensor_above_the_limit_gets_its_own_shard(tmp_path, random_model):
    config = preset("nano", vision=False, vocab_size=320)
    save_model(random_model(config), config, tmp_path / "m", card=CARD, shard_bytes=1)
    table = json.loads((tmp_path / "m" / INDEX).read_text())["weight_map"]
    assert len(set(table.values())) == len(table)
    open_model(tmp_path / "m")


def test_the_same_weights_are_the_same_file(tmp_path, random_model):
    config = preset("nano", vision=False, vocab_size=320)
    model = random_model(config)
    for number in range(5):  # an order decided by chance would show
        save_model(model, config, tmp_path / str(number), card=Card("toy"))
    assert len({(tmp_path / str(n) / "model.safetensors").read_bytes() for n in range(5)}) == 1


def test_saving_over_a_folder_leaves_nothing_of_the_old_one(tmp_path, random_model):
    config = preset("nano", vision=False, vocab_size=320)
    model = random_model(config)
    save_model(model, config, tmp_path / "m", card=CARD, shard_bytes=300_000)
    save_model(model, config, tmp_path / "m", card=CARD)
    assert [p.name for p in (tmp_path / "m").glob("model*")] == [SINGLE]
    assert os.listdir(tmp_path) == ["m"]


def test_a_failed_save_leaves_the_old_folder(tmp_path, random_model):
    config = preset("nano", vision=False, vocab_size=320)
    model = random_model(config)
    save_model(model, config, tmp_path / "m", card=CARD)
    before = (tmp_path / "m" / SINGLE).read_bytes()
    wrong = dict(random_model(config, seed=1).state_dict())
    wrong["lm_head.weight"] = torch.ones(3)
    with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \[3\]"):
        save_model(wrong, config, tmp_path / "m", card=CARD)
    assert (tmp_path / "m" / SINGLE).read_bytes() == before
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("lm_head.weight"), "has no tensor lm_head.weight"),
        (lambda state: state.update(extra=torch.ones(1)), "has an extra tensor extra"),
    ],
)
def test_a_model_that_is_not_its_config_is_not_saved(tmp_path, random_model, change, words):
    config = preset("nano", vision=False, vocab_size=320)
    state = dict(random_model(config).state_dict())
    change(state)
    with pytest.raises(CheckpointError, match=words):
        save_model(state, config, tmp_path / "m", card=CARD)
    assert os.listdir(tmp_path) == []


def test_views_of_one_storage_are_saved_as_they_are(tmp_path, random_model):
    config = preset("nano", vision=False, vocab_size=320)
    state = dict(random_model(config).state_dict())
    flat = torch.cat([state["model.norm.weight"], state["model.layers.0.input_layernorm.weight"]])
    state["model.norm.weight"], state["model.layers.0.input_layernorm.weight"] = flat.chunk(2)
    save_model(state, config, tmp_path / "m", card=CARD)
    again = open_model(tmp_path / "m")[0].state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_generation_config_samples_as_meta_does(tmp_path, random_model):
    config = preset("nano", vision=False, vocab_size=320, eos_token_id=(301, 307), bos_token_id=300)
    save_model(random_model(config), config, tmp_path / "m", card=CARD)
    theirs = GenerationConfig.from_pretrained(tmp_path / "m")
    assert (theirs.do_sample, theirs.temperature, theirs.top_p, theirs.top_k) == (True, 0.6, 0.9, 0)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (300, [301, 307])


def multimodal(tok: Tokenizer):
    from dataclasses import replace

    return replace(preset("nano", vocab_size=len(tok)), image_token_index=tok.patch)


def test_a_whole_folder(tmp_path, random_model, tok):
    config = multimodal(tok)
    save_model(random_model(config), config, tmp_path / "m", tok, card=CARD)
    names = set(os.listdir(tmp_path / "m"))
    assert names >= {"config.json", SINGLE, "tokenizer.json", "tokenizer_config.json",
                     "chat_template.jinja", "generation_config.json", "preprocessor_config.json",
                     "processor_config.json", "README.md"}  # fmt: skip
    assert Tokenizer.open(tmp_path / "m").encode("the fox") == tok.encode("the fox")
    assert ImageProcessor.open(tmp_path / "m") == ImageProcessor.from_vision_config(config.vision)
    text = AutoConfig.from_pretrained(tmp_path / "m").text_config
    assert (text.bos_token_id, text.eos_token_id) == (tok.bos, tok.stop_ids)
    assert open_model(tmp_path / "m")[1].text.eos_token_id == tuple(tok.stop_ids)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, random_model, tok):
    small = preset("nano", vision=False, vocab_size=300)
    with pytest.raises(ConfigError, match=f"tokenizer has {len(tok)} ids"):
        save_model(random_model(small), small, tmp_path / "m", tok, card=CARD)
    other = preset("nano", vocab_size=len(tok))
    with pytest.raises(ConfigError, match=f"<|patch|> is {tok.patch}".replace("|", r"\|")):
        save_model(random_model(other), other, tmp_path / "m", tok, card=CARD)


@pytest.mark.parametrize(
    ("there", "words"),
    [
        (
            ["notes.txt"],
            "holds notes.txt, no part of a model, and would be replaced; remedy: a new",
        ),
        (["config.json", "checkpoints/step-00000001/state.json"], "holds checkpoints, no part of"),
        (["params.json", "consolidated.00.pth", "original/x.json"], "holds original, no part of"),
        (["config.json", ".git/config"], "holds .git, no part of"),
        (["config.json", SINGLE, "pytorch_model.bin"], "holds pytorch_model.bin, no part of"),
        (["tokenizer.json", "tokenizer_config.json"], "is not empty and no model folder; remedy"),
    ],
)
def test_a_folder_with_other_things_is_not_replaced(tmp_path, random_model, there, words):
    config = preset("nano", vision=False, vocab_size=320)
    for name in there:
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).write_text("mine")
    with pytest.raises(ConfigError) as caught:
        save_model(random_model(config), config, tmp_path / "m", card=CARD)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {(tmp_path / "m" / name).read_text() for name in there} == {"mine"}
    assert os.listdir(tmp_path) == ["m"]


def test_where_a_model_may_be_written(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "params.json").touch()
    (tmp_path / "m" / "consolidated.00.pth").touch()
    source = tmp_path / "m" / "hf"
    for target in (tmp_path / "new" / "m", tmp_path / "empty", tmp_path / "m", source):
        check_target(target)
    check_target(source, tmp_path / "m")  # inside what is read: nothing is replaced
    (tmp_path / "link").symlink_to(tmp_path / "m")
    for target in ("m", "link"):
        for inner in (tmp_path / "m", tmp_path / "link" / "hf"):
            with pytest.raises(ConfigError, match=r"is or holds .*, which is being read; remedy"):
                check_target(tmp_path / target, inner)
    with pytest.raises(ConfigError, match=r"params\.json.*, a file"):
        check_target(tmp_path / "m" / "params.json")
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"^\. is or holds the working folder; remedy"):
        check_target(".")
