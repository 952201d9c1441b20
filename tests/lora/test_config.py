"""python -m pytest tests/lora/test_config.py"""

import pytest

from herdling.errors import ConfigError
from herdling.lora.config import LoraConfig


def test_what_people_type():
    assert LoraConfig.parse("r=8, alpha=3.5,targets=attention+*.layers.0.*,dora=true") == (
        LoraConfig(8, 3.5, ("attention", "*.layers.0.*"), dora=True)
    )
    assert LoraConfig.parse("") == LoraConfig()
    assert LoraConfig.parse("rslora=false,r=2") == LoraConfig(r=2)
    assert LoraConfig.parse("targets=attention + head").targets == ("attention", "head")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank=8", "lora: 'rank' is no setting; there are|did you mean"),
        ("target=experts", "did you mean targets"),
        ("r", "lora: 'r' must be NAME=VALUE"),
        ("r=1,r=2", "must be NAME=VALUE, once"),
        ("r=many", "lora r is 'many'; it must be a number"),
        ("r=0", "lora r is 0; it must be at least 1"),
        ("alpha=-1", r"lora alpha is -1\.0; it must be above 0"),
        ("alpha=nan", "lora alpha is nan"),
        ("targets=+", "lora targets has an empty name in it"),
        ("targets=attention+", "lora targets has an empty name in it"),
        ("targets=attention++experts", "lora targets has an empty name in it"),
        ("dora=yes", "lora dora is 'yes'; it must be true or false"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        LoraConfig.parse(text)
    assert "\n" not in str(caught.value)
