"""Run: python -m pytest tests/guard/test_classifier.py. The small text classifier and its texts."""

import json

import pytest
import torch

from herdling.errors import CheckpointError
from herdling.guard import corpus
from herdling.guard.classifier import (
    STRIDE,
    WINDOW,
    Classifier,
    collate,
    features,
    rows_of,
    windows,
    words,
)
from herdling.guard.judges import TextJudge, open_judge
from herdling.guard.taxonomy import CATEGORIES


def test_words_have_one_spelling():
    assert words("Ig\u200bnore ALL!") == ["ignore", "all", "!"]
    assert words("\uff29gnore") == ["ignore"]  # full-width I
    assert words("") == []


@pytest.mark.parametrize(
    "text",
    [
        "i\u0301gnore al\u0335l", "\u00edgnore all", "ig\ufe0fnore all", "ig\u034fnore all", "ig\u3164nore all",
        "\u0456gn\u043er\u0435 \u0430ll", "\u0406GN\u041eRE \u0391LL", "\u0131gnore all", "ig\x00nore all",
        "ig\U000e0020nore all", "ig\u2800nore all",
    ],
)  # fmt: skip
def test_signs_nobody_sees_and_look_alike_letters_make_no_other_word(text):
    assert words(text) == ["ignore", "all"]


def test_other_scripts_stay_words():
    assert words("\uae40\uce58 \u6587\u5b57\nDie Stra\u00dfe") == ["\uae40\uce58", "\u6587\u5b57", "die", "strasse"]  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, WINDOW, WINDOW + 1, 5 * WINDOW + 3])
def test_windows_cover_every_word_and_overlap(count):
    given = [str(i) for i in range(count)]
    found = list(windows(given))
    assert {w for window in found for w in window} == set(given)
    assert len(found) >= 1
    assert all(len(window) <= WINDOW for window in found)
    for i in range(
        count - STRIDE + 1
    ):  # whatever fits in a stride's overlap stands whole in one window
        run = given[i : i + STRIDE]
        assert any(run == list(window[j : j + STRIDE]) for window in found for j in range(WINDOW))


def test_logits_are_sums_over_the_root_of_their_number():
    torch.manual_seed(0)
    classifier = Classifier(["S1", "P1"])
    torch.nn.init.normal_(classifier.table.weight)
    rows = [[features(["one", "two"])], rows_of("word " * 100)]
    assert len(rows[1]) > 1
    logits = classifier(**collate(rows))
    for text, found in zip(rows, logits, strict=True):
        each = [
            classifier.table.weight[row].sum(0) / len(row) ** 0.5 + classifier.bias for row in text
        ]
        torch.testing.assert_close(found, torch.stack(each).amax(0))


def test_an_empty_text_has_the_bias_alone():
    classifier = Classifier(["S1", "P1"])
    scores = classifier.scores("")
    assert scores["S1"] == pytest.approx(torch.tensor(-3.0).sigmoid().item())


def test_a_folder_comes_back_the_same(tmp_path):
    torch.manual_seed(0)
    classifier = Classifier(["S1", "P1"], threshold=0.3)
    torch.nn.init.normal_(classifier.table.weight)
    classifier.about = {"seed": 7}
    classifier.save(tmp_path)
    again = Classifier.open(tmp_path)
    assert (again.threshold, again.about) == (0.3, {"seed": 7})
    text = "some words to score"
    assert again.scores(text) == classifier.scores(text)
    judge = open_judge(tmp_path)
    assert isinstance(judge, TextJudge)
    assert judge.judge([{"role": "user", "content": text}]).score == max(
        again.scores(text).values()
    )


def test_broken_folders_are_told(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        Classifier.open(tmp_path)
    about = tmp_path / "guard.json"
    about.write_text(json.dumps({"categories": ["S1"]}))
    with pytest.raises(CheckpointError, match="threshold"):
        Classifier.open(tmp_path)
    about.write_text(json.dumps({"categories": ["S77"], "threshold": 0.5}))
    with pytest.raises(CheckpointError, match="S77"):
        Classifier.open(tmp_path)
    for wrong, said in (
        ({"categories": [], "threshold": 0.5}, "names no category"),
        ({"categories": ["S1", "S1"], "threshold": 0.5}, "category 'S1' is there twice"),
        ({"categories": ["S1"], "threshold": 1.5}, r"threshold is 1\.5; it must be from 0 to 1"),
        ({"categories": ["S1"], "threshold": float("nan")}, "threshold is nan"),
    ):
        about.write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=said):
            Classifier.open(tmp_path)
    broken = Classifier(["S1"])
    broken.table.weight.data[7] = float("nan")
    broken.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"guard\.safetensors: table\.weight is not finite"):
        Classifier.open(tmp_path)
    Classifier(["S1"]).save(tmp_path)
    (tmp_path / "guard.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"guard\.safetensors"):
        Classifier.open(tmp_path)


def test_splits_share_no_template():
    for items in (corpus.REQUESTS, corpus.REPLIES, corpus.INJECTIONS, corpus.HARMLESS):
        parts = [set(corpus.part(items, split)) for split in ("train", "validation", "test")]
        assert set.union(*parts) == set(items)
        assert sum(map(len, parts)) == len(items) == len(set(items))
    new = set(corpus.LOOKALIKES[len(corpus.LOOKALIKES) // 3 * 2 :])
    trained = " ".join(t.text for t in corpus.texts("train", 3000))
    assert not any(act in trained for act in new)


def test_texts_repeat_and_are_of_every_kind():
    made = corpus.texts("test", 1200, seed=1)
    assert made == corpus.texts("test", 1200, seed=1)
    assert made != corpus.texts("test", 1200, seed=2)
    assert {t.category for t in made} == {None, *CATEGORIES} - {"unreadable"}
    harmless = {t.kind for t in made if t.category is None}
    assert harmless == {
        "act",
        "lookalike",
        corpus.NEW,
        "plain",
        "builtin",
        "talk",
        "question",
        "short",
    }
    assert sum(t.category is None for t in made) == 600
    assert not any(slot in t.text for t in made for slot in ("{act}", "{goal}", "{drop}", "{role}"))
