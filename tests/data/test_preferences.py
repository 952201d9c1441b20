"""Preference pairs from files, their masks, and the loader that packs and resumes.

python -m pytest tests/data/test_preferences.py
"""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from herdling.data import embedded
from herdling.data.pair_loader import PairLoader
from herdling.data.preferences import Pair, counted, open_pairs, render_pair
from herdling.data.records import Sides, sides
from herdling.data.sources import Example
from herdling.data.spec import Opening, open_sources
from herdling.errors import ConfigError, DataError
from herdling.inputs.image_processor import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.config import preset


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(embedded.texts(limit=200_000), 512, "compact")


def write(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return str(path)


def turn(role: str, content) -> dict:
    return {"role": role, "content": content}


def opened(spec: str, tok: Tokenizer, **fields):
    return open_pairs(spec, Opening(tok, split="all", **fields), {})


SAID = turn("assistant", "b")


def said(example, tok: Tokenizer) -> str:
    return tok.decode([t for t, m in zip(example.tokens, example.loss_mask, strict=True) if m])


def test_the_three_ways_to_write_a_pair_are_the_same(tok, tmp_path):
    history = [turn("user", "Hi"), turn("assistant", "Hello."), turn("user", "2 + 2?")]
    good, bad = turn("assistant", "4"), turn("assistant", "5")
    records = [
        {"prompt": history, "chosen": "4", "rejected": "5"},
        {"prompt": history, "chosen": [good], "rejected": [bad]},
        {"chosen": [*history, good], "rejected": [*history, bad]},
    ]
    ((source, _),) = opened(write(tmp_path / "p.jsonl", records), tok)
    first = source.pair(0)
    assert said(first.chosen, tok) == "4<|eot|>"  # not the "Hello." of the history
    assert said(first.rejected, tok) == "5<|eot|>"
    assert all(source.pair(i) == first for i in (1, 2))
    assert source.size == 3


def test_a_plain_prompt_is_the_user_and_tools_are_told(tok, tmp_path):
    tool = {"type": "function", "function": {"name": "calc", "parameters": {}}}
    record = {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go away.", "tools": [tool]}
    ((source, _),) = opened(write(tmp_path / "p.jsonl", [record]), tok)
    text = tok.decode(source.pair(0).chosen.tokens)
    assert "calc" in text
    assert text.endswith("Hi<|eot|><|header_start|>assistant<|header_end|>\n\nHello.<|eot|>")


def test_pictures_stand_beside_the_file(tok, tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    parts = [{"type": "image", "image": "red.png"}, {"type": "text", "text": "Colour?"}]
    record = {"prompt": [turn("user", parts)], "chosen": "red", "rejected": "blue"}
    path = write(tmp_path / "p.jsonl", [record])
    vision = preset("nano", vision=True, vocab_size=512).vision
    assert vision is not None
    ((source, _),) = opened(path, tok, processor=ImageProcessor.from_vision_config(vision))
    pair = source.pair(0)
    assert pair.chosen.tiles is not None
    assert pair.chosen.tokens.count(tok.patch) == pair.rejected.tokens.count(tok.patch) > 0
    record["prompt"][0]["content"][0]["image"] = "missing.png"
    with pytest.raises(DataError, match=r"missing\.png is not a file"):
        opened(write(tmp_path / "q.jsonl", [record]), tok)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "rejected must be text or a list of messages"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "rejected must be text"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same answer"),
        ({"prompt": "a", "chosen": "b", "rejected": []}, "rejected must end with what"),
        ({"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"}, "chosen must end"),
        ({"text": "a", "chosen": "b", "rejected": "c"}, "has chosen, rejected, text"),
        ({"prompt": [{"role": "who", "content": "a"}], "chosen": "b", "rejected": "c"}, "role 'who'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "images": ["x.png"]}, "place is unknown"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "image": "x.png"}, "place is unknown"),
        ({"chosen": "b", "rejected": "c"}, "do not answer the same question; remedy: give it as 'prompt'"),
        ({"prompt": [], "chosen": "b", "rejected": "c"}, "do not answer the same question"),
        ({"chosen": [turn("user", "a"), SAID], "rejected": [turn("user", "b"), turn("assistant", "c")]},
         "do not answer the same question"),
        ({"prompt": "a", "chosen": [turn("user", "a"), SAID], "rejected": "c"}, "do not answer the same question"),
        ({"prompt": "a", "chosen": "c", "rejected": [turn("user", "a"), SAID]}, "do not answer the same question"),
        ({"prompt": "z", "chosen": [turn("user", "a"), SAID], "rejected": [turn("user", "a"), turn("assistant", "c")]},
         "prompt is not what chosen and rejected begin with"),
        ({"prompt": [turn("system", "s"), turn("user", "a")], "chosen": [turn("user", "a"), SAID],
          "rejected": [turn("user", "a"), turn("assistant", "c")]}, "prompt is not what chosen"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "chosen is empty"),
        ({"prompt": "a", "chosen": {"role": "assistant", "text": "b"}, "rejected": "c"}, "neither content nor"),
    ],
)  # fmt: skip
def test_broken_pairs_name_file_and_line(tok, tmp_path, record, message):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write(tmp_path / "p.jsonl", [good, record])
    with pytest.raises(DataError, match=message) as problem:
        opened(path, tok)
    assert "p.jsonl:2" in str(problem.value)


def test_other_files_are_refused_with_a_remedy(tok, tmp_path):
    chat = write(tmp_path / "c.jsonl", [{"messages": [turn("user", "a"), turn("assistant", "b")]}])
    with pytest.raises(DataError, match="no preference pair"):
        opened(chat, tok)[0][0].pair(0)
    (tmp_path / "t.txt").write_text("hello")
    with pytest.raises(DataError, match="holds no preference pairs"):
        opened(str(tmp_path / "t.txt"), tok)
    with pytest.raises(ConfigError, match=r"data .nothing.: no such file"):
        opened("nothing", tok)
    pairs = write(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    ((source, _),) = open_sources(pairs, Opening(tok, split="all"))
    with pytest.raises(DataError, match="herdling dpo"):
        source.example(0)


def test_datasets_that_repeat_the_prompt(tok, tmp_path):
    """As UltraFeedback has it: prompt, whole conversations, and one of them again as messages."""
    whole = [[turn("user", "a"), turn("assistant", t)] for t in "bc"]
    record = {"prompt": "a", "chosen": whole[0], "rejected": whole[1], "messages": whole[0]}
    ((source, _),) = opened(write(tmp_path / "p.jsonl", [record]), tok)
    assert tok.decode(source.pair(0).chosen.tokens).count("user") == 1
    assert said(source.pair(0).chosen, tok) == "b<|eot|>"


def test_a_system_text_beside_a_pair_is_read(tok, tmp_path):
    whole = [[turn("user", "a"), turn("assistant", t)] for t in "bc"]
    records = [{"system": "Be kind.", "prompt": " a\n", "chosen": "b", "rejected": "c"},
               {"system": "Be kind.", "prompt": " a\n", "chosen": whole[0], "rejected": whole[1]}]  # fmt: skip
    ((source, _),) = opened(write(tmp_path / "p.jsonl", records), tok)
    for i in range(2):
        assert tok.decode(source.pair(i).chosen.tokens).count("Be kind.") == 1


def test_an_implicit_prompt_keeps_the_last_turn_as_the_answer():
    same = [turn("user", "a"), turn("assistant", "b")]
    found = sides({"chosen": same, "rejected": [*same, turn("user", "c"), turn("assistant", "d")]})
    assert found.prompt == same[:1]
    assert found.chosen == same[1:]


def test_which_tokens_count(tok):
    asked = Sides(
        [turn("user", "x")], *([turn("assistant", t)] for t in ("It is red.", "It is blue."))
    )
    pair = render_pair(asked, tok)

    def words(without):
        masks = counted(pair, tok, without)
        return [
            tok.decode([t for t, m in zip(side.tokens, mask, strict=True) if m])
            for side, mask in zip((pair.chosen, pair.rejected), masks, strict=True)
        ]

    assert words("none") == ["It is red.<|eot|>", "It is blue.<|eot|>"]
    assert words("format") == ["It is red.", "It is blue."]
    chosen, rejected = words("shared")
    assert chosen in " red"
    assert rejected in " blue"
    assert chosen != rejected


def test_a_prefix_leaves_something_to_compare(tok):
    asked = Sides([turn("user", "x")], [turn("assistant", "a b")], [turn("assistant", "a b a b")])
    masks = counted(render_pair(asked, tok), tok, "shared")
    assert sum(masks[0]) == 0
    assert sum(masks[1]) > 0


def numbered(tmp_path: Path, count: int, name: str = "p.jsonl") -> str:
    return write(
        tmp_path / name,
        [{"prompt": f"{i}?", "chosen": str(i), "rejected": f"no {i}"} for i in range(count)],
    )


def make(spec: str, tok: Tokenizer, **fields) -> PairLoader:
    given = {"count": 100, "batch_size": 4, "length": 64, **fields}
    return PairLoader(opened(spec, tok), tok, **given)


def test_each_pair_comes_once_a_round_and_both_answers_are_together(tok, tmp_path):
    loader = make(numbered(tmp_path, 12), tok)
    assert len(loader) == 12
    loader.reference = torch.arange(24.0).view(12, 2)
    seen = []
    for batch in islice(loader, 3):
        learnt = batch["labels"] != -100
        at = batch["sequences"][learnt]
        assert set(at.tolist()) == set(range(8))
        assert (batch["counted"] <= learnt).all()
        assert (batch["sequences"][batch["documents"] < 0] == -1).all()
        seen += batch["reference"][:, 0].tolist()
    assert sorted(seen) == [2.0 * i for i in range(12)]
    again = [x for b in islice(loader, 3) for x in b["reference"][:, 0].tolist()]
    assert sorted(again) == sorted(seen)
    assert again != seen


def test_it_resumes_where_it_was(tok, tmp_path):
    path = numbered(tmp_path, 12)
    whole, cut = make(path, tok), make(path, tok)
    batches = list(islice(whole, 5))
    list(islice(cut, 2))
    state = json.loads(json.dumps(cut.state_dict()))
    other = make(path, tok)
    other.load_state_dict(state)
    for batch, expected in zip(islice(other, 3), batches[2:], strict=True):
        for name, tensor in expected.items():
            assert torch.equal(batch[name], tensor), name
    changed = make(numbered(tmp_path, 11, "q.jsonl"), tok)
    with pytest.raises(DataError, match="read differently"):
        changed.load_state_dict(state)


def test_two_processes_share_a_round(tok, tmp_path):
    path = numbered(tmp_path, 8)
    seen = []
    for rank in range(2):
        loader = make(path, tok, batch_size=2, rank=rank, world=2)
        loader.reference = torch.arange(16.0).view(8, 2)
        seen += [x for b in islice(loader, 2) for x in b["reference"][:, 0].tolist()]
    assert sorted(seen) == [2.0 * i for i in range(8)]


def test_what_does_not_fit_is_left_out_and_counted(tok, tmp_path):
    long = {"prompt": "a", "chosen": "word " * 200, "rejected": "c"}
    short = {"prompt": "a", "chosen": "b", "rejected": "c"}
    loader = make(write(tmp_path / "p.jsonl", [long, short]), tok)
    assert (len(loader), loader.skipped) == (1, 1)
    with pytest.raises(DataError, match="no pair fits"):
        make(write(tmp_path / "q.jsonl", [long]), tok)


def test_a_source_without_end_whose_pairs_are_all_too_long_is_told(tok, tmp_path):
    class Long:
        name, size = "long", None

        def pair(self, index):
            return Pair(*[Example([1] * 99, [True] * 99, None, "long")] * 2)

    sources = [*opened(numbered(tmp_path, 3), tok), (Long(), 1.0)]
    with pytest.raises(DataError, match="long: none of 1000 pairs fits a row of 64 tokens"):
        PairLoader(sources, tok, count=9, batch_size=2, length=64)


def test_another_picture_is_another_pair(tok, tmp_path):
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Colour?"}]
    record = {"prompt": [turn("user", parts)], "chosen": "red", "rejected": "blue"}
    path = write(tmp_path / "p.jsonl", [record])
    processor = ImageProcessor(size=32, patch_size=8)
    digests = []
    for colour in ("red", "blue"):
        Image.new("RGB", (32, 32), colour).save(tmp_path / "a.png")
        pairs = opened(path, tok, processor=processor)
        digests.append(PairLoader(pairs, tok, count=1, batch_size=1, length=64).digest)
    assert digests[0] != digests[1]


def test_answers_that_read_the_same_are_told(tok, tmp_path):
    calls = [{"name": "f", "arguments": a} for a in ({"x": 1}, '{"x":1}')]
    said = [{"role": "assistant", "content": "", "tool_calls": [call]} for call in calls]
    path = write(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": said[:1], "rejected": said[1:]}])
    with pytest.raises(DataError, match=r"p\.jsonl:1: chosen and rejected read the same"):
        make(path, tok)


def test_each_source_is_named_once(tok, tmp_path):
    path = numbered(tmp_path, 3)
    with pytest.raises(ConfigError, match="each may be named once"):
        make(f"{path},{path}:2", tok)


def test_weights_are_shares(tok, tmp_path):
    one, two = numbered(tmp_path, 100), numbered(tmp_path, 100, "q.jsonl")
    loader = make(f"{one}:3,{two}:1", tok, count=40)
    assert loader.shares() == {one: 0.75, two: 0.25}
