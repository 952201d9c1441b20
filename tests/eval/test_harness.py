"""Accuracy is the mean grade of greedy replies; intervals, samples and refusals."""

import json
import random

import pytest
from PIL import Image

from herdling.data.split import draw
from herdling.errors import ConfigError, InputError
from herdling.eval.harness import Score, change, evaluate, question, wilson
from herdling.rollouts.play import Game, play
from herdling.tasks.base import Item, ask, exact
from herdling.tasks.registry import create


class Echo:
    """Its answer is what the model says anyway, for items with an even index."""

    name = "echo"
    chance = 0.25

    def __init__(self, lm, pictures: bool = True) -> None:
        self.lm, self.pictures = lm, pictures

    def item(self, index: int, split: str) -> Item:
        assert split == "test"
        number = draw("echo", 0, split, index, lambda r: r.randrange(10**6), str)
        picture = [Image.new("RGB", (32, 32), (number % 255, 0, 0))] if self.pictures else []
        messages = ask("say " + "x" * (index % 5), *picture)
        said = self.lm.chat(messages, temperature=0.0, max_tokens=6)["content"]
        return Item(messages, said if index % 2 == 0 else "no such reply", 0.5, str(number))

    def grade(self, item: Item, reply: str) -> float:
        return exact(item.answer, reply)


def test_accuracy_is_the_share_of_right_replies(lm):
    score = evaluate(lm, Echo(lm), items=11, max_tokens=6, keep=3)
    assert score.task == "echo"
    assert score.items == 11
    assert score.accuracy == pytest.approx(6 / 11)
    assert (score.low, score.high) == wilson(6 / 11, 11)
    assert score.chance == 0.25
    assert score.above_chance == (score.low > 0.25)
    assert score.cut_short == 11
    assert score.seconds > 0
    assert [s.grade for s in score.samples] == [1.0, 0.0, 1.0]
    assert score.grades == [1.0, 0.0] * 5 + [1.0]
    assert score.samples[0].reply == score.samples[0].item.answer
    assert isinstance(score.samples[0].item.messages[0]["content"][0]["image"], Image.Image)


def test_the_json_form_has_texts_and_no_pictures(lm):
    score = evaluate(lm, Echo(lm), items=3, max_tokens=6)
    plain = json.loads(json.dumps(score.plain()))
    assert plain["accuracy"] == pytest.approx(2 / 3)
    assert plain["samples"][1] == {
        "question": "[image] say x",
        "answer": "no such reply",
        "reply": score.samples[1].reply,
        "grade": 0.0,
    }


def test_built_in_tasks_run_on_an_untrained_model(lm):
    for name in ("read_number", "count_shapes"):
        score = evaluate(lm, create(name), items=6, max_tokens=4)
        assert 0 <= score.low <= score.accuracy <= score.high <= 1
        assert not score.above_chance


def test_several_tries_count_with_their_mean(lm):
    class Length:
        name, chance = "length", 0.0
        item = staticmethod(lambda index, split: Item(ask("x" * (index + 1)), "", 0.5, str(index)))
        grade = staticmethod(lambda item, reply: len(reply) % 2)

    task = Length()
    score = evaluate(lm, task, items=4, tries=5, temperature=1.0, max_tokens=4)
    games = [Game(task, task.item(i % 4, "test"), i) for i in range(20)]
    played = play(lm, games, max_tokens=4, temperature=1.0)
    assert score.accuracy == pytest.approx(sum(one.grade for one in played) / 20)
    assert 0 < score.accuracy < 1
    assert (score.items, len(score.samples)) == (4, 8)


def test_refusals(lm, make_lm):
    with pytest.raises(ConfigError, match="tries is 0"):
        evaluate(lm, Echo(lm), tries=0)
    with pytest.raises(ConfigError, match="items is 0"):
        evaluate(lm, Echo(lm), items=0)
    with pytest.raises(InputError, match="image"):
        evaluate(make_lm(vision=False), create("read_number"), items=2)


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81 / 263, 263, 0.2553, 0.3662),
        (15 / 148, 148, 0.0624, 0.1605),
        (0 / 20, 20, 0.0, 0.1611),
        (1 / 29, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_of_the_literature(share, count, low, high):
    assert wilson(share, count) == pytest.approx((low, high), abs=5e-5)


def test_wilson_covers_about_95_percent():
    rng = random.Random(0)
    inside = 0
    for _ in range(2000):
        share = sum(rng.random() < 0.3 for _ in range(50)) / 50
        low, high = wilson(share, 50)
        inside += low <= 0.3 <= high
    assert inside / 2000 == pytest.approx(0.95, abs=0.02)


def test_question_reads_text_and_parts():
    assert question(Item(ask("why?"), "", 0, "")) == "why?"
    picture = Image.new("RGB", (4, 4))
    assert question(Item(ask("why?", picture, picture), "", 0, "")) == "[image] [image] why?"


def graded(*grades: float, task: str = "t") -> Score:
    return Score(task, len(grades), sum(grades) / len(grades), 0, 1, 0, 0, 0.0, [], list(grades))


def test_a_change_is_measured_item_by_item():
    before = graded(*[1.0] * 50 + [0.0] * 50)
    after = graded(*[1.0] * 40 + [0.0] * 60)
    moved = change(before, after)
    assert moved.gained == pytest.approx(-0.1)
    # Ten items fell and none rose: variance of -1 and 0 over 99.
    variance = (10 * 0.9**2 + 90 * 0.1**2) / 99
    assert moved.noise == pytest.approx(1.959964 * (variance / 100) ** 0.5)
    assert moved.lost
    assert not change(after, before).lost
    same = change(before, before)
    assert (same.gained, same.noise, same.lost) == (0.0, 0.03, False)
    for other in (graded(1.0), graded(*before.grades, task="u")):
        with pytest.raises(ConfigError, match="cannot be compared"):
            change(before, other)
