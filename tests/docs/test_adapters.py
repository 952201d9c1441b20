"""python -m pytest tests/docs/test_adapters.py: the page's example runs on a toy model."""

import re
from pathlib import Path

import herdling
from herdling.infer.lm import LM
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.model.llama import build

PAGE = Path(__file__).parents[2] / "docs/adapters.md"


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tok = Tokenizer.train(["the same words again and again, " * 8], 320)
    config = preset("nano", vision=False, vocab_size=len(tok))
    herdling.save(LM(initialize(build(config), seed=1, std=0.1), tok), "runs/demo/model")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    names: dict = {"__name__": "example"}
    exec(compile(code, str(PAGE), "exec"), names)
    assert "experts" in capsys.readouterr().out
    prompts = ["the same"]
    adapted = names["served"].generate(prompts, adapter="again", max_tokens=8)[0]
    merged = herdling.load("runs/merged").generate(prompts, max_tokens=8)[0]
    assert adapted.ids == merged.ids != names["served"].generate(prompts, max_tokens=8)[0].ids
