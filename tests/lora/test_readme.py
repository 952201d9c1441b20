"""python -m pytest tests/lora/test_readme.py"""

import yaml

from herdling import lora


def test_the_block_and_the_duties(make_model, put_on):
    model = make_model()
    put_on(model, ("experts",))
    plain = lora.readme(model, "mine", "runs/base", how="By hand.")
    block = yaml.safe_load(plain.split("---")[1])
    assert block == {"library_name": "peft", "tags": ["llama4", "herdling", "lora"]}
    assert "# mine\n\nA LoRA adapter of `runs/base` in peft's format. By hand." in plain
    assert lora.table(model) in plain
    owed = lora.readme(model, "Llama-mine", "o/b", on_hub=True, duties="made with Llama 4: do this")
    block = yaml.safe_load(owed.split("---")[1])
    assert (block["base_model"], block["license_name"]) == ("o/b", "llama4")
    assert "**Built with Llama**\n\nMade with Llama 4: do this." in owed
