"""Tuning on the hard part of a pool: what is rated, kept, dropped, and how it resumes.

python -m pytest tests/recipes/test_judged.py
"""

import json
import shutil
from pathlib import Path

import pytest

import herdling
from herdling.checkpoint import Card
from herdling.data.sources import Example
from herdling.errors import ConfigError, DataError
from herdling.inputs.tokenizer import Tokenizer
from herdling.metrics import METRICS
from herdling.recipes import judged, sft
from herdling.train.state import CheckpointConfig


@pytest.fixture(scope="module")
def base(pretrained) -> Path:
    return pretrained(vision=False)


def config(base: Path, out: Path, **fields) -> sft.Config:
    given = dict(
        data="arithmetic,form", judge=f"loss:{base}", pool=40, steps=4, rows=2, length=96,
        checkpoint=CheckpointConfig(every=2, keep=3),
    )  # fmt: skip
    return sft.Config(model=str(base), out=out, **{**given, **fields})


class Lengths:
    """Long examples are hard."""

    calls = 0

    def rate(self, examples: list[Example]) -> list[float | None]:
        Lengths.calls += len(examples)
        return [float(len(e.tokens)) for e in examples]


class Fixed:
    """Examples of these lengths."""

    def __init__(self, name: str, lengths: list[int]) -> None:
        self.name = name
        self.size: int | None = len(lengths)
        self.lengths = lengths

    def example(self, index: int) -> Example:
        n = self.lengths[index]
        return Example([index, *range(n - 1)], [True] * n, None, self.name)


def test_the_hard_part_is_kept_and_the_card_says_so(base, tmp_path, monkeypatch):
    monkeypatch.setattr(judged, "open_judge", lambda *_: Lengths())
    sft.main(config(base, tmp_path / "run", judge="lengths"))
    told = json.loads((tmp_path / "run" / "judge.json").read_text())
    assert (told["pool"], told["kept"], told["without_verdict"]) == (40, 20, 0)
    assert told["dropped"]["form"] < told["dropped"]["arithmetic"]  # its questions are longer
    lines = [json.loads(line) for line in (tmp_path / "run" / "ratings.jsonl").read_text().split("\n") if line]  # fmt: skip
    assert len(lines) <= 40  # equal examples are rated once
    card = Card.open(tmp_path / "run" / "model", herdling.load(tmp_path / "run" / "model").config)
    assert "the hard 50% of 40 examples, rated by lengths" in str(card.steps[-1])


def test_which_examples_are_trained_on(base, tmp_path, monkeypatch):
    monkeypatch.setattr(judged, "open_judge", lambda *_: Lengths())
    taken: dict[str, list[Example]] = {}

    tok = Tokenizer.open(base)
    sources = [(Fixed("short", [3, 4, 5, 20]), 1.0), (Fixed("long", [30, 31, 2, 33]), 1.0)]
    for keep, expected in (("hard:0.5", {"short": [20], "long": [30, 31, 33]}),
                           ("easy:0.25", {"short": [3], "long": [2]})):  # fmt: skip
        kept, _ = judged.keep_part(sources, "x", keep, 100, tok, 0, tmp_path / keep)
        taken = {s.name: [s.example(i) for i in range(s.size or 0)] for s, _ in kept}
        assert {n: sorted(len(e.tokens) for e in es) for n, es in taken.items()} == expected
    assert [w for _, w in kept] == [0.25, 0.25]


def test_a_pool_too_small_for_all_sources_is_told_before_rating(base, tmp_path, monkeypatch):
    monkeypatch.setattr(judged, "open_judge", lambda *_: pytest.fail("rated"))
    with pytest.raises(ConfigError, match="pool is 1, which leaves nothing of form to rate"):
        sft.main(config(base, tmp_path / "run", judge="lengths", pool=1))


def test_a_killed_run_resumes_to_the_same_bytes(base, tmp_path):
    sft.main(config(base, tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "model")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-00000004")
    ratings = tmp_path / "b" / "ratings.jsonl"
    ratings.write_text(ratings.read_text()[:-40])  # killed in the middle of a line
    sft.main(config(base, tmp_path / "b", resume=True))
    for name in (METRICS, "model/model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_ratings_of_another_judge_are_not_taken(base, tmp_path, monkeypatch):
    """A run that was killed before its first step may be started again with another."""
    sources, tok = [(Fixed("all", [3, 4, 5, 20]), 1.0)], Tokenizer.open(base)
    asked: list[tuple] = []
    monkeypatch.setattr(judged, "open_judge", lambda *how: asked.append(how) or Lengths())
    for spec, seed, times in (("x", 0, 1), ("x", 1, 1), ("y", 0, 2), ("x", 0, 2),
                              ("random", 0, 3), ("random", 1, 4), ("random", 0, 4)):  # fmt: skip
        judged.keep_part(sources, spec, "hard:0.5", 100, tok, seed, tmp_path)
        assert len(asked) == times, (spec, seed)


def test_what_has_no_verdict_is_not_made_up_for_by_what_is_easy(
    base, tmp_path, monkeypatch, capsys
):
    class Some(Lengths):
        def rate(self, examples: list[Example]) -> list[float | None]:
            return [None if len(e.tokens) > 9 else float(len(e.tokens)) for e in examples]

    monkeypatch.setattr(judged, "open_judge", lambda *_: Some())
    sources, tok = [(Fixed("all", [3, 4, 5, 6, 20, 21, 22]), 1.0)], Tokenizer.open(base)
    ((kept, _),), _ = judged.keep_part(sources, "x", "hard:0.5", 100, tok, 0, tmp_path)
    assert sorted(len(kept.example(i).tokens) for i in range(kept.size or 0)) == [5, 6]
    assert "of 7 examples, 3 without a verdict, 2 stay" in capsys.readouterr().out


def test_a_judge_without_verdicts_is_an_error(base, tmp_path):
    # A random model says nothing of use when it is asked in words.
    with pytest.raises(DataError, match="gave a verdict on"):
        sft.main(config(base, tmp_path / "run", judge=str(base), pool=4))


@pytest.mark.parametrize("keep", ["hard", "hard:1", "hard:0", "soft:0.5", "hard:x"])
def test_what_to_keep_must_be_clear(base, tmp_path, keep):
    with pytest.raises(ConfigError, match=r"write hard:0\.5"):
        config(base, tmp_path, keep=keep)
