"""Replies in a form that is asked for: every right reply, and near misses."""

import json

import pytest

from herdling.errors import ConfigError
from herdling.tasks.instructions import Instructions


def test_json_with_given_keys() -> None:
    task = Instructions(kinds=("json",))
    for i in range(50):
        item = task.item(i, "train")
        facts = json.loads(item.answer)
        question = item.messages[0]["content"]
        assert all(key in question and str(value) in question for key, value in facts.items())
        pretty = json.dumps(dict(reversed(facts.items())), indent=2)
        for right in (item.answer, pretty, f"```json\n{pretty}\n```"):
            assert task.grade(item, right) == 1.0
        less, more = dict(list(facts.items())[1:]), {**facts, "x": 1}
        texts = {key: str(value) for key, value in facts.items()}
        wrong = [
            json.dumps(w)
            for w in (less, more, [facts], list(facts), {k.upper(): v for k, v in facts.items()})
        ]
        if texts != facts:
            wrong.append(json.dumps(texts))
        for reply in (
            *wrong,
            "",
            f"{item.answer} {item.answer}",
            f"Sure: {item.answer}",
            str(facts),
            "{}",
        ):
            assert task.grade(item, reply) == 0.0, reply


def test_n_of_the_words() -> None:
    task = Instructions(kinds=("words",))
    for i in range(50):
        item = task.item(i, "train")
        given, count = item.key.split()[1:], len(item.answer.split())
        assert str(count) in item.messages[0]["content"]
        last = given[-count:]
        for right in (
            item.answer,
            " ".join(last),
            ", ".join(last),
            "\n".join(reversed(last)) + ".",
            item.answer.upper(),
        ):
            assert task.grade(item, right) == 1.0
        for reply in (
            " ".join(given),
            " ".join(given[: count + 1]),
            " ".join(given[: count - 1]),
            "",
            " ".join([given[0]] * count),
            " ".join(["zzz"] * count),
            f"{item.answer} and",
            f"1. {item.answer}",
            "\u200b" + item.answer,
            item.answer * 2,
        ):
            assert task.grade(item, reply) == 0.0, reply


def test_the_asked_language() -> None:
    task = Instructions(kinds=("language",))
    asked = {
        i.messages[0]["content"]: i.answer
        for split in ("train", "test")
        for n in range(3000)
        if (i := task.item(n, split))
    }
    assert asked["Which month comes after May? Answer in French."] == "juin"
    assert asked["Which day comes before Monday? Answer in German."] == "Sonntag"
    assert asked["Which month comes after December? Answer in Finnish."] == "tammikuu"
    item = task.item(0, "train")
    assert task.grade(item, f" {item.answer.capitalize()}.") == 1.0
    assert task.grade(item, f"{item.answer} {item.answer}") == task.grade(item, "May") == 0.0


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"kinds is \(\); use some of json, words, language"):
        Instructions(kinds=())
