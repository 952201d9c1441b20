"""python -m pytest tests/docs/test_speculation.py: the page's arithmetic gives what the page says."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/speculation.md"


def test_the_arithmetic_gives_the_figures_of_its_comment(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if "predict(" in block]
    exec(compile(code, str(PAGE), "exec"), {})
    said = [float(x) for x in code.rsplit("#", 1)[1].split(",")]
    assert [round(float(x), 2) for x in capsys.readouterr().out.split()] == said
