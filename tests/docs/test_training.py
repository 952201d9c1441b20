"""python -m pytest tests/docs/test_training.py: the page's example runs, twice."""

import re
from pathlib import Path

from herdling import metrics

PAGE = Path(__file__).parents[2] / "docs/training.md"


def test_the_example_runs_and_resumes(tmp_path, monkeypatch, capsys):
    from accelerate.state import AcceleratorState

    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    for said in ("no checkpoint yet: starting at step 0", "resumed at step 20 from runs/counting"):
        AcceleratorState._reset_state(True)
        exec(compile(code, str(PAGE), "exec"), {"__name__": "example"})
        assert said in capsys.readouterr().err
    AcceleratorState._reset_state(True)
    lines = metrics.read("runs/counting/metrics.jsonl")
    loss = [line["loss"] for line in lines if "loss" in line]
    assert len(loss) == 20
    assert loss[-1] < loss[0]
    assert sum("note" in line for line in lines) == 2
