"""Preference pairs from a model's own replies.

python -m pytest tests/rollouts/test_pairs.py
"""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from herdling.data import embedded
from herdling.data.preferences import RecordPairs
from herdling.data.records import JsonLines
from herdling.errors import DataError
from herdling.infer.lm import LM
from herdling.inputs.tokenizer import Tokenizer
from herdling.recipes.start import start
from herdling.rollouts import pairs
from herdling.tasks.base import Item, ask, exact


@pytest.fixture(scope="module")
def lm(tmp_path_factory) -> LM:
    folder = tmp_path_factory.mktemp("tok")
    Tokenizer.train(embedded.texts(limit=200_000), 512, "compact").save(folder)
    begun = start("nano", folder, name="nano")
    return LM(begun.model, begun.tok, begun.processor)


class Brief:
    """Likes the shortest reply best."""

    name, chance = "brief", 0.5

    def item(self, index: int, split: str) -> Item:
        return Item(ask("Well?"), "", 0.5, str(index))

    def grade(self, item: Item, reply: str) -> float:
        return 1 / (1 + len(reply))


class Seen:
    name, chance = "seen", 0.1

    def item(self, index: int, split: str) -> Item:
        picture = Image.frombytes("RGB", (32, 32), random.Random(index).randbytes(3072))
        return Item(ask("Number?", picture), str(index), 0.5, str(index))

    def grade(self, item: Item, reply: str) -> float:
        return exact(item.answer, reply)


def canned(replies: dict[int, list[tuple[str, bool]]]):
    """A `play` that gives (reply, truncated) for each item of each try."""

    def play(lm, games, **_):
        found = []
        for game in games:
            text, cut = replies.get(int(game.item.key), [("?", False)] * 8)[game.seed % 4]
            messages = [*game.item.messages, {"role": "assistant", "content": text}]
            grade = game.task.grade(game.item, text)
            found.append(
                SimpleNamespace(
                    grade=grade, truncated=cut, length=len(text), messages=messages, reply=text
                )
            )
        return found

    return play


def test_silence_is_not_chosen(lm, tmp_path, monkeypatch):
    replies = {0: [("", False), ("so", False), ("a", False), ("abc", False)]}
    monkeypatch.setattr(pairs, "play", canned(replies))
    path = tmp_path / "pairs.jsonl"
    assert pairs.write_pairs(lm, [(Brief(), 1.0)], path, count=1, tries=4) == {"brief": 1}
    ((_, _, record),) = [JsonLines([path]).read(0)]
    assert record["chosen"][0]["content"] == "a"


def test_the_shortest_right_answer_beside_the_first_wrong_one(lm, tmp_path, monkeypatch):
    replies = {
        0: [("0.", False), ("nil", False), ("0", False), ("2", False)],
        1: [("1", False)] * 4,  # always right: nothing to learn
        2: [("2", True), ("x", False), ("x", False), ("x", False)],  # right, but never ended
        3: [("y", True), ("3", False), ("3", False), ("3", False)],
    }
    monkeypatch.setattr(pairs, "play", canned(replies))
    path = tmp_path / "pairs.jsonl"
    given = pairs.write_pairs(lm, [(Seen(), 1.0)], path, count=9, tries=4)
    assert given == {"seen": 2}
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in records] == [("0", "nil"), ("3", "y")]  # fmt: skip
    # The file is an ordinary one, and its pictures are the very same pixels.
    source = RecordPairs("own", JsonLines([path]), lm.tokenizer, lm.processor)
    tiles = source.pair(1).chosen.tiles
    assert tiles is not None
    again = lm.render(Seen().item(3, "train").messages).tiles[0].pixel_values
    torch.testing.assert_close(tiles, again, rtol=0, atol=0)


def test_nothing_to_compare_is_an_error(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "play", canned({}))
    with pytest.raises(DataError, match="no prompt of seen got both"):
        pairs.write_pairs(lm, [(Seen(), 1.0)], tmp_path / "p.jsonl", count=2, tries=4)
    assert not list(tmp_path.iterdir())


def test_a_few_pairs_of_many_tasks_come_to_their_count(lm, tmp_path, monkeypatch):
    right_and_wrong = {n: [(str(n), False), ("no", False)] * 2 for n in range(64)}
    monkeypatch.setattr(pairs, "play", canned(right_and_wrong))
    tasks = []
    for name in "abc":
        task = Seen()
        task.name = name
        tasks.append((task, 1.0))
    for count in (1, 4, 5, 64):
        given = pairs.write_pairs(lm, tasks, tmp_path / "p.jsonl", count=count, tries=4)
        assert sum(given.values()) == count
        assert max(given.values()) - min(given.values()) <= 1
