"""The Python of `docs/data.md` runs as printed, and its table is true."""

import re
from pathlib import Path

import pytest

from herdling.data.spec import Opening, open_sources
from herdling.inputs.tokenizer import Tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_the_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "docs/data.md", "exec"), {})
    assert re.search(r"'skipped': 0, 'share/code': 0\.\d+", capsys.readouterr().out)


def test_the_records_are_records(tmp_path: Path) -> None:
    (lines,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "cat.png").touch()
    (tmp_path / "a.jsonl").write_text(lines)
    opening = Opening(Tokenizer.train([], 300), split="all")
    ((source, _),) = open_sources(str(tmp_path / "a.jsonl"), opening)
    assert source.size == 6
