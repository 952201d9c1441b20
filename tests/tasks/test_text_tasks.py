"""The text tasks: right answers by other means, and the chance each states."""

import ast
import re
from collections import Counter

import pytest
from babel import Locale

from herdling.data.split import SPLITS
from herdling.errors import ConfigError
from herdling.tasks.arithmetic import Arithmetic
from herdling.tasks.base import Item, Task, normalise
from herdling.tasks.cldr_names import CldrNames
from herdling.tasks.languages import Languages
from herdling.tasks.sorting import Sorting
from herdling.tasks.strings import Strings
from herdling.tasks.translation import Translation


def items(task: Task, split: str = "test", count: int = 400) -> list[Item]:
    return [task.item(i, split) for i in range(count)]


def question(item: Item) -> str:
    return item.messages[0]["content"]


def test_sums_are_right() -> None:
    for item in items(Arithmetic(most=500, most_factor=40)):
        found = re.search(r"\d+ [-+*] \d+", question(item))
        assert found
        a, sign, b = found[0].split()
        tree = ast.parse(found[0], mode="eval").body
        assert isinstance(tree, ast.BinOp)
        want = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
        assert int(item.answer) == want >= 0


def test_a_pair_of_numbers_is_in_one_split_either_way_round() -> None:
    pairs = {
        split: {frozenset(re.findall(r"\d+", question(i))) for i in items(Arithmetic(operations="+"), split, 600)}
        for split in ("train", "test")
    }  # fmt: skip
    assert not pairs["train"] & pairs["test"]


@pytest.mark.parametrize("sign", "+-*")
def test_the_best_guess_of_a_sum_is_as_stated(sign: str) -> None:
    task = Arithmetic(most=30, most_factor=20, operations=sign)
    answers = Counter(item.answer for item in items(task, "train", 4000))
    assert max(answers.values()) / 4000 == pytest.approx(task.chance, abs=0.015)


def test_each_operation_is_equally_likely_in_each_split() -> None:
    for split in SPLITS:
        signs = Counter(re.findall(r" ([-+*]) ", question(i))[0] for i in items(Arithmetic(), split, 900))  # fmt: skip
        assert all(abs(signs[sign] - 300) < 60 for sign in "+-*")


def test_sorted_numbers_are_sorted() -> None:
    task = Sorting(longest=5)
    for item in items(task):
        asked = [int(x) for x in re.findall(r"\d+", question(item))]
        assert [int(x) for x in item.answer.split()] == sorted(asked)
        assert 2 <= len(asked) <= 5
    copied = [task.grade(i, " ".join(re.findall(r"\d+", question(i)))) for i in items(task, "train", 4000)]  # fmt: skip
    assert sum(copied) / len(copied) == pytest.approx(task.chance, abs=0.03)


def test_words_are_turned_and_counted() -> None:
    task = Strings()
    kinds: Counter[str] = Counter()
    for item in items(task, count=900):
        text, word = question(item), item.key
        if item.answer.isdigit():
            letter = re.findall(r"\b[a-z]\b", text)[0]
            assert int(item.answer) == word.count(letter)
            kinds[item.answer] += 1
        elif item.answer.isupper():
            assert item.answer == word.upper()
            assert task.grade(item, f" {item.answer}. ") == 1.0
            assert task.grade(item, word) == 0.0  # the question's own spelling is no answer
            kinds["upper"] += 1
        else:
            assert item.answer == "".join(reversed(word)) != word
            kinds["reverse"] += 1
        assert word in text
    assert all(abs(kinds[count] - 100) < 35 for count in "012")
    assert all(abs(kinds[kind] - 300) < 60 for kind in ("upper", "reverse"))


def test_languages_are_equally_likely_and_names_have_one() -> None:
    task = Languages()
    assert task.chance == 1 / 8
    for split in ("train", "test"):
        answers = Counter(item.answer for item in items(task, split, 1600))
        assert set(answers) == set(task.names)
        assert all(abs(count - 200) < 50 for count in answers.values())
    seen: Counter[str] = Counter()
    for names in task.names.values():
        seen.update({normalise(name) for name in names})
    assert max(seen.values()) == 1
    german = {item.key for item in items(task, "test", 1600) if item.answer == "German"}
    assert german <= {normalise(name) for name in Locale.parse("de").languages.values()} | {
        normalise(name)
        for table in ("territories", "scripts", "currencies")
        for name in getattr(Locale.parse("de"), table).values()
    }


def test_facts_are_those_of_cldr() -> None:
    everything = {one.question: one.answer for asked in CldrNames().questions.values() for one in asked}  # fmt: skip
    for text, answer in (
        ("What is Germany called in French?", "Allemagne"),
        ("Which country is called Duitsland in Dutch?", "Germany"),
        ("What is the currency of Japan?", "Japanese Yen"),
        ("What is the official language of Brazil?", "Portuguese"),
    ):
        assert everything[text] == answer
    assert not any(re.search("[{}]", text) for text in everything)
    assert everything["What is Peru called in Spanish?"] == "Per\u00fa"
    assert "What is Argentina called in Spanish?" not in everything  # the same word
    assert "What is Italy called in Polish?" in everything


def test_facts_asked_in_the_test_are_taught_in_other_words() -> None:
    task = CldrNames()
    assert all(len(asked) >= 80 for asked in task.questions.values())
    taught = {(i.answer, _subject(i)) for i in items(task, "train", 20_000)}
    tested = {(i.answer, _subject(i)) for i in items(task, "test", 2000)}
    assert len(tested) > 100
    assert len(tested - taught) <= 0.01 * len(tested)


def _subject(item: Item) -> frozenset[str]:
    """The names in a question: its words in capitals, without those that open it."""
    opening = {"What", "Which", "How", "Translate", "In"}
    return frozenset(re.findall(r"\b[A-Z]\w+", question(item))) - opening


def test_constant_guesses_earn_no_more_than_chance() -> None:
    task = CldrNames()
    drawn = items(task, "train", 4000)
    best = 0.0
    for asked in task.questions.values():
        top = Counter(normalise(one.answer) for one in asked).most_common(1)[0][0]
        mine = {one.question for one in asked}
        best += sum(task.grade(i, top) for i in drawn if i.key in mine) / len(drawn)
    assert best == pytest.approx(task.chance, abs=0.03)
    assert task.chance < 0.15


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="operations is '/'; use some of"):
        Arithmetic(operations="/")
    with pytest.raises(ConfigError, match="most 0 and most_factor 10 must be at least 1"):
        Arithmetic(most=0)
    with pytest.raises(ConfigError, match="longest is 1 and most 99"):
        Sorting(longest=1)
    with pytest.raises(ConfigError, match="longest is 3; it must be at least 4"):
        Strings(longest=3)
    with pytest.raises(ConfigError, match="name at least two"):
        Languages(languages=["de", "de"])
    with pytest.raises(ConfigError, match=r"kinds is \('capital',\); use some of name, country"):
        CldrNames(kinds=["capital"])
    with pytest.raises(ConfigError, match="country 'XQ' is unknown to CLDR"):
        CldrNames(countries=["XQ"])
    for make in (
        lambda: CldrNames(languages=["xq"]),
        lambda: Languages(languages=["de", "xq"]),
        lambda: Translation(languages=["de", "en", "xq"]),
    ):
        with pytest.raises(ConfigError, match="language 'xq' is unknown to CLDR; use codes such"):
            make()
    with pytest.raises(ConfigError, match="nothing to ask about name"):
        CldrNames(languages=["en"])
