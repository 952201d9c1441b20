"""Steps, dates, units, translation, retrieval and the picture tasks beside them: right by other means."""

import re
from collections import Counter
from datetime import date

import pytest
from babel import Locale

from herdling.errors import ConfigError
from herdling.tasks.arithmetic import Arithmetic
from herdling.tasks.dates import Dates
from herdling.tasks.documents import ReadWord
from herdling.tasks.retrieval import Retrieval
from herdling.tasks.shapes import PointShape
from herdling.tasks.steps import Steps
from herdling.tasks.tables import ReadTable
from herdling.tasks.translation import Translation, pairs
from herdling.tasks.units import UNITS, Units


def test_steps_are_worked_out() -> None:
    task = Steps(steps=4)
    results: Counter[str] = Counter()
    for i in range(400):
        item = task.item(i, "train")
        text = item.messages[0]["content"]
        value = int(re.findall(r"\d+", text)[0])
        for verb, number in re.findall(r"(Add|Subtract|Multiply by) (\d+)", text):
            other = int(number)
            value = {"Add": value + other, "Subtract": value - other}.get(verb, value * other)
        assert item.answer.endswith(f"= {value}")
        for line in item.answer.split("\n"):
            left, _, right = line.partition(" = ")
            assert eval(left) == int(right)
            assert 0 <= int(right) <= 99
        results[str(value)] += 1
        for reply in (item.answer, str(value), f"The answer is {value}.", f"nonsense\n= {value}"):
            assert task.grade(item, reply) == 1.0
        for reply in (
            "",
            f"{value + 1}",
            f"{value} or {value + 1}",
            f"{item.answer} or 1",
            f"{item.answer}x",
            f"{item.answer}\n{value + 1}",
            " ".join(map(str, range(100))),
            "nan",
            f"{value}\nI do not know",
        ):
            assert task.grade(item, reply) == 0.0, reply
    assert results.most_common(1)[0][1] / 400 <= task.chance + 0.025


def test_working_that_is_trained_states_no_sum_that_arithmetic_holds_out() -> None:
    task, sums = Steps(), Arithmetic()
    held_out = {sums.item(i, s).key for s in ("validation", "test") for i in range(1500)}
    assert len(held_out) > 80
    stated: dict[str, set[str]] = {"train": set(), "test": set()}
    for split, keys in stated.items():
        for i in range(1500):
            for line in task.item(i, split).answer.split("\n"):
                a, sign, b = line.partition(" = ")[0].split()
                keys.add(f"{min(int(a), int(b))}{sign}{max(int(a), int(b))}")
    assert not stated["train"] & held_out
    assert stated["test"] & held_out


def test_steps_stay_within_narrow_bounds() -> None:
    task = Steps(most=10)
    for i in range(300):
        numbers = re.findall(r"^\d+|\d+$", task.item(i, "train").answer, re.MULTILINE)
        assert max(map(int, numbers)) <= 10


def test_dates_are_those_of_the_calendar() -> None:
    task = Dates()
    kinds = Counter()
    for i in range(600):
        item = task.item(i, "test")
        text = item.messages[0]["content"]
        days = [date.fromisoformat(found) for found in re.findall(r"\d{4}-\d\d-\d\d", text)]
        if len(days) == 2:
            assert item.answer == str((days[1] - days[0]).days)
            kinds["between"] += 1
        elif "week" in text:
            assert item.answer == days[0].strftime("%A")
            kinds["weekday"] += 1
        else:
            span = int(re.findall(r"\b\d{1,2}\b(?= days)", text)[0])
            assert (date.fromisoformat(item.answer) - days[0]).days == span
            kinds["later"] += 1
    assert all(abs(count - 200) < 60 for count in kinds.values())


def test_units_are_converted() -> None:
    task, factors = Units(), {(large, small): times for large, small, times in UNITS}
    for i in range(400):
        item = task.item(i, "train")
        count, large, small = item.key.split()
        given = int(re.findall(r"\d+", item.messages[0]["content"])[0])
        assert {given, int(item.answer)} == {int(count), int(count) * factors[large, small]}
        assert task.grade(item, f"{int(item.answer):,}.") == 1.0
        assert task.grade(item, f"{item.answer} {small}") == 0.0


def test_translations_are_those_of_cldr() -> None:
    table = {(p.word, p.source, p.target): p.answer for p in pairs(("de", "en", "es", "fi"))}
    assert table["Montag", "German", "Spanish"] == "lunes"
    assert table["lokakuu", "Finnish", "English"] == "October"
    assert table["Deutschland", "German", "Finnish"] == "Saksa"
    assert not any(word.casefold() == answer.casefold() for (word, _, _), answer in table.items())
    task = Translation()
    for i in range(200):
        item = task.item(i, "test")
        assert item.key.startswith(
            tuple(item.messages[0]["content"].replace("Translate ", "").split()[:1])
        )
    seen = {(i.answer, i.key.split()[-1]) for n in range(8000) if (i := task.item(n, "train"))}
    asked = {(i.answer, i.key.split()[-1]) for n in range(1000) if (i := task.item(n, "test"))}
    assert len(asked - seen) <= 0.01 * len(asked)  # the word is taught from other languages
    assert Locale.parse("fi").days["stand-alone"]["wide"][0] in {answer for answer, _ in seen}


def test_the_asked_line_is_found() -> None:
    task = Retrieval(lines=200, fewest=100)
    for i in range(20):
        item = task.item(i, "test")
        *_, document, question = ("", *item.messages[0]["content"].split("\n"))
        lines = dict(re.findall(r"The code of (\w+) is (\d+)\.", document))
        assert 100 <= len(lines) <= 200
        word = re.findall(r"\w+", question)[-1]
        assert lines[word] == item.answer
        assert task.grade(item, " ".join(lines.values())) == 0.0
    assert Retrieval().chance == pytest.approx(sum(1 / n for n in range(3, 11)) / 8)


def test_points_are_the_centres() -> None:
    task = PointShape(side=64)
    inside = 0
    for i in range(40):
        item = task.item(i, "train")
        across, down = map(int, item.answer.split())
        image, (x, y) = (
            item.messages[0]["content"][0]["image"],
            (6.4 * across + 3.2, 6.4 * down + 3.2),
        )
        # The asked shape is there: some pixel within the tenth differs from the paper of the corner.
        paper = Counter(
            image.get_flattened_data() if hasattr(image, "get_flattened_data") else image.getdata()
        ).most_common(1)[0][0]
        inside += any(
            image.getpixel((min(63, int(x + dx)), min(63, int(y + dy)))) != paper
            for dx in (-3, 0, 3)
            for dy in (-3, 0, 3)
        )
        for reply in (
            item.answer,
            f"({across}, {down})",
            f"{across},{down}",
            f"{min(9, across + 1)} {max(0, down - 1)}",
        ):
            assert task.grade(item, reply) == 1.0, reply
        far = f"{(across + 2) % 10} {down}" if across < 8 else f"{across - 2} {down}"
        for reply in (
            far,
            "",
            "5",
            f"{across}{down}",
            f"{item.answer} or {far}",
            f"{across}.0 {down}.0",
            "0 1 2 3 4 5 6 7 8 9",
            f"-{item.answer}",
            f"{across}\u0665 {down}",
        ):
            assert task.grade(item, reply) == 0.0, reply
    assert inside == 40


def test_tables_state_what_is_asked() -> None:
    task = ReadTable(side=64, lines=3, longest=5)
    for i in range(30):
        item = task.item(i, "train")
        lines = dict(line.split() for line in item.key.removeprefix("table ").split(", "))
        assert len(lines) == 3
        question = item.messages[0]["content"][-1]["text"]
        (word,) = [word for word in lines if re.search(rf"\b{word}\b", question)]
        assert lines[word] == item.answer


def test_settings_are_checked() -> None:
    for make, message in (
        (lambda: Steps(steps=1), "steps is 1 and most 99"),
        (lambda: Dates(most=0), "most is 0"),
        (lambda: Units(most=1), "most is 1"),
        (lambda: Translation(languages=["de", "en"]), "name at least three"),
        (lambda: Retrieval(lines=2), "fewest is 3 and lines 2"),
        (lambda: ReadWord(longest=2), "longest is 2; it must be at least 3"),
        (lambda: ReadTable(longest=2).item(0, "train"), "longest is 2; it must be at least 3"),
        (lambda: ReadTable(lines=9).item(0, "train"), "lines is 9; it must be 1 to 6"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
