"""Text files: parts, line numbers of broken bytes, and splits."""

from pathlib import Path

import pytest

from herdling.data.text_files import PART_BYTES, TextFiles
from herdling.errors import ConfigError, DataError


def texts(files: TextFiles) -> list[str]:
    return [files.text(i) for i in range(len(files))]


def test_small_files_are_one_document_each(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "b.txt").write_text("drei\u2028\u00e9")
    (tmp_path / "empty.txt").write_text(" \n\n")
    files = TextFiles(sorted(tmp_path.iterdir()))
    assert texts(files) == ["one\r\ntwo", "drei\u2028\u00e9"]
    assert [files.characters(i) for i in range(2)] == [8, 6]


def test_long_files_are_cut_at_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    text = "".join(f"line \u00e9 {i}\n" for i in range(20_000)) + "x" * (2 * PART_BYTES) + "\nend"
    path.write_text(text)
    files = TextFiles([path])
    parts = texts(files)
    assert "".join(parts) == text
    assert all(part.endswith(("\n", "x")) for part in parts[:-1])
    assert all(len(part.encode()) <= PART_BYTES for part in parts)
    assert [files.characters(i) for i in range(len(files))] == [len(part) for part in parts]
    by_split = [set(texts(TextFiles([path], split))) for split in ("train", "validation", "test")]
    assert sum(len(s) for s in by_split) == len(set(parts))
    assert set().union(*by_split) == set(parts)


@pytest.mark.parametrize("sheep", ["s", "\u00e9", "\u4e2d", "\U0001f411"])
def test_a_long_line_is_cut_between_characters(tmp_path: Path, sheep: str) -> None:
    path = tmp_path / "line.txt"
    text = "\ufeff" + "." + sheep * (3 * PART_BYTES // len(sheep.encode())) + "\nnext\n"
    path.write_text(text)
    files = TextFiles([path])
    sizes = [len(part.encode()) for part in texts(files)]
    assert "".join(texts(files)) == text[1:]
    assert all(PART_BYTES - 4 < size <= PART_BYTES for size in sizes[:-1])
    assert len(sizes) == 4
    path.write_bytes(b"fine\n" + b"\x80" * (2 * PART_BYTES))
    with pytest.raises(DataError, match=r"line.txt:2: byte 0x80 is not UTF-8"):
        TextFiles([path])
    assert sum(map(len, texts(TextFiles([path], errors="replace")))) == 5 + 2 * PART_BYTES


def test_a_broken_byte_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"fine\n" * 30_000 + b"caf\xe9\n" + b"fine\n")
    with pytest.raises(DataError, match=r"latin.txt:30001: byte 0xe9 is not UTF-8; remedy"):
        TextFiles([path])
    assert "caf\ufffd\n" in "".join(texts(TextFiles([path], errors="replace")))
    with pytest.raises(ConfigError, match="encoding_errors is 'ignore'; use strict or replace"):
        TextFiles([path], errors="ignore")


def test_files_that_vanish_are_named(tmp_path: Path) -> None:
    path = tmp_path / "gone.txt"
    with pytest.raises(DataError, match=r"gone.txt: cannot be read: No such file"):
        TextFiles([path])
    path.write_text("here")
    files = TextFiles([path])
    path.unlink()
    with pytest.raises(DataError, match=r"gone.txt: cannot be read: No such file"):
        files.text(0)
