"""Folders that appear at once, and what a killed process leaves.

python -m pytest tests/test_files.py
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from herdling.errors import CheckpointError, ConfigError
from herdling.files import atomic_folder, check_file, check_folder, read_json

KILLED = """
import os, signal, sys
from herdling.files import atomic_folder
with atomic_folder(sys.argv[1]) as folder:
    (folder / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path: Path, text: str) -> None:
    with atomic_folder(path) as folder:
        (folder / "text").write_text(text)


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    path = tmp_path / "model"
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)]).returncode == -9
    (left,) = names(tmp_path)
    assert left.startswith(f".model.{platform.node()}-")
    write(tmp_path / "other", "x")
    assert left in names(tmp_path)  # not its own
    write(path, "new")
    assert names(tmp_path) == ["model", "other"]


def test_what_living_processes_and_other_machines_write_stays(tmp_path):
    kept = [f".model.{platform.node()}-{os.getppid()}.abc", ".model.elsewhere-1.abc", ".model.x"]
    for name in kept:
        (tmp_path / name).mkdir()
    write(tmp_path / "model", "new")
    assert names(tmp_path) == sorted([*kept, "model"])


def test_a_write_after_a_crash_between_two_renames_keeps_the_old_folder_till_it_ends(tmp_path):
    (tmp_path / ".model.old").mkdir()
    (tmp_path / ".model.old" / "text").write_text("old")

    def fail() -> None:
        with atomic_folder(tmp_path / "model"):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert (tmp_path / "model" / "text").read_text() == "old"
    write(tmp_path / "model", "new")
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "text").read_text() == "new"


def test_places_where_nothing_can_be_written_are_told_before_the_work(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    check_file(None, "json")
    check_file(file, "json")
    check_file(tmp_path / "new/scores.json", "json")
    check_folder(tmp_path, "out")
    check_folder(tmp_path / "new/run", "out")
    with pytest.raises(ConfigError, match=r"json is '.*', a folder; remedy: the name of a file"):
        check_file(tmp_path, "json")
    with pytest.raises(ConfigError, match=r"out is '.*file', a file; remedy: the name of a folder"):
        check_folder(file, "out")
    for check in (check_file, check_folder):
        with pytest.raises(ConfigError, match=r"below', but .*file is a file"):
            check(file / "below", "out")


@pytest.mark.parametrize("check", [check_file, check_folder])
def test_a_place_that_takes_no_files_is_told_before_the_work(check, tmp_path, monkeypatch) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, f"Permission denied: {dir}")

    monkeypatch.setattr("herdling.files.tempfile.TemporaryFile", refuse)
    with pytest.raises(ConfigError, match=r"nothing can be written in .* .Permission denied"):
        check(tmp_path / "new" / "deep", "out")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "9" * 5000, "\xff"])
def test_json_that_cannot_be_read_is_told_with_its_file(tmp_path, text):
    file = tmp_path / "config.json"
    file.write_text(text, "latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON: "):
        read_json(file, CheckpointError)
