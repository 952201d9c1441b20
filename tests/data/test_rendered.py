"""Rendered pictures: pure, split by content, true to their answers, legible, quick."""

import hashlib
import random
import time
from typing import Any

import numpy as np
import pytest

from herdling.data.charts import Chart
from herdling.data.drawing import DARK_PAPERS, INKS, PALETTE, Picture
from herdling.data.pages import make_document, words
from herdling.data.rendered import KINDS, render
from herdling.data.scenes import COLOURS, CORNERS, SHAPES, Scene, Thing
from herdling.data.split import SPLITS, split_of
from herdling.errors import ConfigError


def digest(picture: Picture) -> str:
    return hashlib.sha256(b"".join(image.tobytes() for image in picture.images)).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_pure_in_all_arguments(kind: str) -> None:
    first, again = render(kind, 3, 5), render(kind, 3, 5)
    assert digest(first) == digest(again)
    assert (first.caption, first.questions) == (again.caption, again.questions)
    others = [render(kind, 4, 5), render(kind, 3, 6), render(kind, 3, 5, "test")]
    assert len({digest(first), *map(digest, others)}) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_no_picture_of_one_split_is_in_another(kind: str) -> None:
    counts = {"train": 2000, "validation": 300, "test": 500}
    made = {split: [render(kind, 0, i, split) for i in range(n)] for split, n in counts.items()}
    for what in (digest, lambda picture: picture.content):
        seen = {split: {what(picture) for picture in made[split]} for split in SPLITS}
        assert not seen["train"] & seen["test"]
        assert not seen["train"] & seen["validation"]
        assert not seen["validation"] & seen["test"]
    assert len({digest(picture) for picture in made["train"]}) > 1000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [20, 32, 64, 100])
def test_size_and_mode(kind: str, side: int) -> None:
    picture = render(kind, 0, 0, side=side)
    assert all((image.size, image.mode) == ((side, side), "RGB") for image in picture.images)
    assert len(picture.images) == (4 if kind == "clip" else 1)
    assert picture.questions
    assert picture.caption.endswith(".")


@pytest.mark.parametrize("kind", KINDS)
def test_quick_enough_to_make_on_the_fly(kind: str) -> None:
    render(kind, 0, 0)
    start = time.perf_counter()
    for index in range(200):
        render(kind, 0, index)
    assert (time.perf_counter() - start) / 200 < 2e-3  # 0.05 to 0.25 ms on a quiet machine


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("number", {}),
        ("number", {"digits": (4, 4)}),
        ("document", {}),
        ("document", {"side": 64, "lines": 3, "longest": 6}),
        ("document", {"side": 224, "lines": 6, "longest": 10}),
    ],
)
def test_writing_stays_inside_and_stands_out(kind: str, options: dict[str, Any]) -> None:
    for index in range(200):
        pixels = np.asarray(render(kind, 0, index, **options).images[0]).astype(int)
        paper = pixels[0, 0]
        ring = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (ring == paper).all()
        ink = np.abs(pixels - paper).sum(-1)
        assert ink.max() > 300
        assert 0.02 < (ink > 150).mean() < 0.5


def test_inks_and_colours_are_far_apart() -> None:
    for ink, paper in INKS:
        assert abs(_luminance(ink) - _luminance(paper)) > 90
    colours = [*PALETTE.values()]
    for i, one in enumerate(colours):
        assert all(np.abs(np.subtract(one, other)).sum() > 120 for other in colours[i + 1 :])
        assert all(np.abs(np.subtract(one, paper)).sum() > 150 for paper in DARK_PAPERS)


def _luminance(colour: tuple[int, int, int]) -> float:
    return float(np.dot(colour, (0.299, 0.587, 0.114)))


def test_shapes_keep_to_their_cells_and_colours() -> None:
    for shape in SHAPES:
        for cell in range(9):
            for shift in (-0.026, 0.026):
                thing = Thing(shape, "blue", cell, 0.14, shift, shift)
                pixels = np.asarray(Scene((thing,), DARK_PAPERS[0]).draw(96)).astype(int)
                inside = np.abs(pixels - DARK_PAPERS[0]).sum(-1) > 0
                rows, columns = np.nonzero(inside)
                assert {*rows // 32} == {cell // 3}
                assert {*columns // 32} == {cell % 3}
                x, y = (int(share * 96) for share in thing.centre)
                assert tuple(pixels[y, x]) == PALETTE["blue"]


def test_answers_about_scenes_are_true() -> None:
    asked = set()
    for index in range(300):
        picture = render("scene", 0, index)
        things = [part.split(" at the ") for part in picture.caption.rstrip(".").split(", ")]
        names = [name.split() for name, _ in things]
        for question in picture.questions:
            asked.add(question.about)
            if question.about == "count":
                colour = [c for c in COLOURS if f" {c} " in question.text]
                shape = [
                    s for s in SHAPES if f" {s}" in question.text and "shapes" not in question.text
                ]
                want = sum(
                    (not colour or c in colour) and (not shape or s in shape) for c, s in names
                )
                assert question.answer == str(want), (picture.caption, question)
            elif question.about in ("colour", "place"):
                found = [i for i, (_, s) in enumerate(names) if s in question.text]
                assert len(found) == 1
                want = names[found[0]][0] if question.about == "colour" else things[found[0]][1]
                assert question.answer == want
            else:
                assert [question.answer] == [s for c, s in names if c in question.text]
    assert asked == {"count", "colour", "place", "shape"}


def test_places_are_where_they_say() -> None:
    for cell, corner in CORNERS.items():
        scene = Scene((Thing("circle", "white", cell, 0.14, 0, 0),), DARK_PAPERS[0])
        rows, columns = np.nonzero(np.asarray(scene.draw(32)).sum(-1) > 300)
        assert corner == f"{'top' if rows.mean() < 16 else 'bottom'} " + (
            "left" if columns.mean() < 16 else "right"
        )


@pytest.mark.parametrize("side", [32, 64, 224])
def test_bars_are_as_high_as_their_values(side: int) -> None:
    for low in range(1, 9):
        chart = Chart(("red", "blue"), (low, low + 1), DARK_PAPERS[0])
        pixels = np.asarray(chart.draw(side))
        red, blue = ((pixels == PALETTE[c]).all(-1).any(1).sum() for c in ("red", "blue"))
        unit = (side - 2 * (side // 16) - 1) / 9
        assert abs(red - low * unit) <= 1
        assert abs(blue - (low + 1) * unit) <= 1
        assert chart.tallest == "blue"
        assert chart.smallest == "red"


def test_clips_move_as_they_say_and_hide_it_in_the_first_frame() -> None:
    starts: dict[str, list[float]] = {}
    for index in range(200):
        picture = render("clip", 0, index)
        frames = [np.asarray(image).astype(int) for image in picture.images]
        centres = []
        for frame in frames:
            rows, columns = np.nonzero(np.abs(frame - frame[0, 0]).sum(-1) > 120)
            centres.append((columns.mean(), rows.mean()))
        x, y = np.subtract(centres[-1], centres[0])
        way = ("right" if x > 0 else "left") if abs(x) > abs(y) else ("down" if y > 0 else "up")
        assert [q.answer for q in picture.questions if q.about == "motion"] == [way]
        assert max(abs(x), abs(y)) == pytest.approx(0.3 * 32, abs=1.5)
        starts.setdefault(way, []).append(centres[0][0])
    assert len(starts) == 4
    assert max(starts["right"]) > min(starts["left"])


def test_numbers_have_the_digits_asked_for() -> None:
    lengths = [len(render("number", 0, i).questions[0].answer) for i in range(400)]
    assert {lengths.count(n) > 60 for n in range(1, 4)} == {True}
    for index in range(100):
        answer = render("number", 0, index, digits=(2, 3)).questions[0].answer
        assert answer == str(int(answer))
        assert len(answer) in (2, 3)


def test_a_page_holds_words_of_one_split_only() -> None:
    for split in SPLITS:
        for index in range(50):
            picture = render("document", 0, index, split, side=64, lines=3, longest=6)
            assert {split_of(f"word {q.answer}") for q in picture.questions} == {split}
            assert [q.answer for q in picture.questions] == picture.caption.rstrip(".").split()
    assert len(words("train", 4)) > 300
    assert min(len(words(split, 4)) for split in SPLITS) > 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "song"}, "kind is 'song'; there are number, scene"),
        ({"kind": "scene", "side": 8}, "side is 8"),
        ({"kind": "scene", "split": "dev"}, "split is 'dev'"),
        ({"kind": "scene", "index": -1}, "index is -1"),
        ({"kind": "scene", "most": 12}, "1 to 12 shapes; a scene holds 1 to 9"),
        ({"kind": "number", "digits": (3, 2)}, "use \\(fewest, most\\)"),
        ({"kind": "document", "lines": 9}, "lines is 9; it must be 1 to 6"),
        ({"kind": "document", "side": 16, "lines": 3}, "does not fit legibly in 14 pixels"),
        ({"kind": "clip", "frames": 1}, "frames is 1; a movement needs at least 2"),
    ],
)
def test_what_cannot_be_drawn(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        render(**({"seed": 0, "index": 0} | options))


def test_documents_are_drawn_from_every_split() -> None:
    rng = random.Random(0)
    made = [split_of(make_document(rng).content) for _ in range(500)]
    assert all(made.count(split) > 10 for split in SPLITS)
