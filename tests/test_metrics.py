"""python -m pytest tests/test_metrics.py"""

import io
import json
import re

import pytest
from rich.console import Console

from herdling import metrics
from herdling.errors import CheckpointError, DataError
from herdling.metrics import Lines, Metrics, Progress


def test_lines_are_json_in_order_and_floats_come_back_exactly(tmp_path):
    written = Metrics(tmp_path)
    written.log(1, loss=1 / 3, load=[[0.1, 0.9]])
    written.log(2, loss=1e-300, note="caf\u00e9")
    written.timing(2, seconds=1.5)
    assert metrics.read(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1 / 3, "load": [[0.1, 0.9]]},
        {"step": 2, "loss": 1e-300, "note": "caf\u00e9"},
    ]
    assert metrics.read(tmp_path / "timing.jsonl") == [{"step": 2, "seconds": 1.5}]


def test_not_finite_numbers_stay_visible_in_valid_json(tmp_path):
    Metrics(tmp_path).log(1, a=float("nan"), b=[float("inf")], c={"d": -float("inf")})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"step": 1, "a": "nan", "b": ["inf"], "c": {"d": "-inf"}}


def test_rewind_gives_the_bytes_of_a_run_that_never_went_on(tmp_path):
    kept = Metrics(tmp_path)
    kept.log(1, loss=3.0)
    kept.timing(1, seconds=0.1)
    place, before = kept.place(), (tmp_path / "metrics.jsonl").read_bytes()
    kept.log(2, loss=2.0)
    kept.timing(2, seconds=0.1)
    del kept
    with (tmp_path / "timing.jsonl").open("ab") as torn:
        torn.write(b'{"step": 3, "sec')

    again = Metrics(tmp_path)
    again.rewind(1, place)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert metrics.read(tmp_path / "timing.jsonl") == [{"step": 1, "seconds": 0.1}]
    again.log(2, loss=2.5)
    assert metrics.read(tmp_path / "metrics.jsonl")[1] == {"step": 2, "loss": 2.5}
    again.rewind(0, 0)
    assert metrics.read(tmp_path / "metrics.jsonl") == []


def test_a_file_shorter_than_its_checkpoint_says_so(tmp_path):
    lines = Lines(tmp_path / "metrics.jsonl")
    with pytest.raises(CheckpointError, match="has 0 bytes but the checkpoint was saved at 9"):
        lines.cut(9)


def test_read_leaves_out_a_torn_last_line_but_not_a_broken_one(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert metrics.read(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"m\.jsonl:2: not valid JSON"):
        metrics.read(path)
    with pytest.raises(DataError, match="no such file"):
        metrics.read(tmp_path / "none")


def test_a_process_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    silent = Metrics(None)
    silent.log(1, loss=1.0)
    silent.rewind(0, silent.place())
    assert list(tmp_path.iterdir()) == []


def test_without_a_terminal_progress_is_plain_lines_not_too_many(capsys):
    with Progress("train", 100) as progress:
        for done in range(1, 101):
            progress.update(done, f"loss {1 / done:.2f}")
        progress.note("a [bold]note[/bold] as written")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3  # the first, the last, the note
    assert re.fullmatch(r"train 1/100  loss 1\.00  eta \d+:\d\d", lines[0])
    assert re.fullmatch(r"train 100/100  loss 0\.01  eta 0:00", lines[1])
    assert lines[2] == "a [bold]note[/bold] as written"


def test_on_a_terminal_progress_is_a_bar(monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr("rich.console.Console", lambda **_: console)
    with Progress("train", 4) as progress:
        progress.restart(2)
        progress.update(3, "loss 0.50  load 1.2x")
    text = screen.getvalue()
    assert "3/4" in text
    assert "loss 0.50  load 1.2x" in text


def test_a_hidden_progress_prints_nothing(capsys):
    with Progress("train", 2, show=False) as progress:
        progress.update(1)
        progress.note("x")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("number", "text"), [(950, "950"), (12345, "12.3k"), (4.56e6, "4.56M"), (2e9, "2G")]
)
def test_short(number, text):
    assert metrics.short(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (65, "1:05"), (7384, "2:03:04")])
def test_clock(seconds, text):
    assert metrics.clock(seconds) == text
