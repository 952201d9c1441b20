"""python -m pytest tests/docs/test_safeguards.py: the page's example and policy are good as they stand."""

import re
from pathlib import Path

from herdling import config
from herdling.guard.classifier import Classifier
from herdling.guard.policy import Policy

PAGE = Path(__file__).parents[2] / "docs/safeguards.md"


def test_the_example_and_the_policy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    classifier = Classifier(["S1", "P1"])
    classifier.bias.data[1] = 5.0
    classifier.save(tmp_path / "runs/guard")
    text = PAGE.read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, str(PAGE), "exec"), {})
    assert capsys.readouterr().out == "('P1',) 0.99\n"
    (policy,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    Path("policy.yaml").write_text(policy)
    assert config.load(Policy, "policy.yaml").of("S6") == "log"
