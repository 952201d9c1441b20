"""The whole chain through its real `main`: python -m pytest tests/recipes/test_qat.py"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import herdling
from herdling.errors import ConfigError
from herdling.model.sites import sites
from herdling.quant.swap import matrix_of
from herdling.recipes import qat, sft
from herdling.recipes.qat import Adapter, Config, Full, Preference


@pytest.fixture(scope="module")
def base(pretrained) -> Path:
    return pretrained(vision=False)


def config_of(base: Path, out: Path) -> Config:
    return Config(
        model=str(base), out=out, data="arithmetic", length=96, rows=2, full=Full(1, 1e-3),
        adapter=Adapter(1, 1e-2, "r=2,targets=attention+experts"), preference=Preference(1, 1e-3, pairs=4),
    )  # fmt: skip


def test_three_stages_one_after_the_other(base, tmp_path, capsys, monkeypatch):
    config = config_of(base, tmp_path / "run")
    assert qat.main(config) == 0
    out = config.out
    stages = [load_file(out / s / "model/model.safetensors") for s in ("full", "adapter", "preference")]  # fmt: skip
    name = "model.layers.0.feed_forward.experts.down_proj"
    assert torch.equal(stages[0][name], stages[1][name])  # frozen below the adapter
    assert not torch.equal(stages[1][name], stages[2][name])  # DPO moves both
    files = ["adapter/adapter", "preference/adapter", "lora"]
    second, third, final = (load_file(out / f / "adapter_model.safetensors") for f in files)
    assert any(not torch.equal(second[n], third[n]) for n in second)
    assert all(torch.equal(third[n], final[n]) for n in third)
    lm = herdling.load(out / "quantized", adapters={"own": out / "lora"})
    kept = {site.kind for site in sites(lm.model) if matrix_of(lm.model, site) is not None}
    assert kept == {"attention", "shared", "experts", "head"}
    assert lm.generate(["2 + 3"], adapter="own", max_tokens=2)
    # Again: nothing is trained anew, and a lost last copy is made again.
    capsys.readouterr()
    monkeypatch.setattr(sft, "main", lambda config: pytest.fail("trained twice"))
    assert qat.main(config) == 0
    assert "w4a8 after preference" in capsys.readouterr().out
    # What is there was made with these settings, and does not pass for what others would give.
    held = (out / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"other settings \(seed: \d+ -> 99\); remedy: the same"):
        qat.main(replace(config, seed=99))
    assert (out / "config.yaml").read_bytes() == held


def test_settings(base, tmp_path):
    config = config_of(base, tmp_path)
    with pytest.raises(ConfigError, match="one must be above 0"):
        replace(config, full=Full(0), adapter=Adapter(0), preference=Preference(0))
    with pytest.raises(ConfigError, match=r"preference\.steps without adapter\.steps"):
        replace(config, adapter=Adapter(0))
    for wrong, message in (
        ({"rows": 0}, "rows is 0"),
        ({"preference": Preference(pairs=0)}, "pairs is 0"),
        ({"preference": Preference(learning_rate=-1.0)}, "learning_rate is -1.0"),
        ({"adapter": Adapter(lora="r=x")}, "lora r is 'x'"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(config, **wrong)
    with pytest.raises(ConfigError, match="no format 'w4a9'"):
        replace(config, format="w4a9")
