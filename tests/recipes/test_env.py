"""python -m pytest tests/recipes/test_env.py"""

import json
import platform

import torch

import herdling
from herdling import cli


def test_env_prints_and_writes_what_a_bug_report_needs(tmp_path, capsys):
    assert cli.main(["env", "--json", str(tmp_path / "env.json")]) == 0
    report = json.loads((tmp_path / "env.json").read_text())
    assert report["herdling"] == herdling.__version__
    assert report["torch"] == torch.__version__
    assert report["python"] == platform.python_version()
    assert report["torch threads"] == torch.get_num_threads()
    assert report["cores"] >= 1
    assert {"transformers", "cpu", "cpu flags", "compiler", "gpu", "memory GiB"} <= report.keys()
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert printed["torch"] == torch.__version__


def test_env_on_a_bare_machine(tmp_path, monkeypatch):
    """No compiler and an absent library are said, not raised."""
    from herdling.recipes import env

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(env, "LIBRARIES", ("no-such-library",))
    report = env.collect()
    assert report["compiler"] == "none found"
    assert report["no-such-library"] == "not installed"
