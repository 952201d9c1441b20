"""What a training run is told of its files reaches them.

python -m pytest tests/recipes/test_stage_data.py
"""

from dataclasses import replace

import pytest

from herdling.data.split import split_of
from herdling.errors import ConfigError, DataError
from herdling.inputs.tokenizer import Tokenizer
from herdling.recipes import pretrain


def test_a_run_can_take_all_of_a_file_and_replace_its_broken_bytes(tmp_path):
    Tokenizer.train([], 300, "compact").save(tmp_path / "tok")
    path = tmp_path / "a.txt"
    endings = (f"{i} caf".encode() + b"\xe9" for i in range(1000))
    path.write_bytes(next(e for e in endings if split_of(e.decode(errors="replace")) == "test"))
    config = pretrain.Config(
        model="nano", tokenizer=tmp_path / "tok", vision=False, data=str(path),
        out=tmp_path / "run", steps=1, rows=1, length=32,
    )  # fmt: skip
    with pytest.raises(DataError, match="set encoding_errors to replace"):
        pretrain.main(config)
    config = replace(config, encoding_errors="replace")
    with pytest.raises(DataError, match="set split to all"):
        pretrain.main(config)
    config = replace(config, split="all")
    assert pretrain.main(config) == 0
    with pytest.raises(ConfigError, match=r"encoding_errors is 'strict' but .* trained with"):
        pretrain.main(replace(config, encoding_errors="strict", resume=True, steps=1))
