"""From random weights to a language model that sees: next token on packed documents.

    herdling pretrain --model tiny --tokenizer runs/tok --data builtin --out runs/base --steps 2000
    herdling pretrain --model runs/base/model --data 'books/*.txt' --out runs/more --steps 500

Built-in data mixes code, English, many languages and rendered pictures; loss is on all text.
"""

from dataclasses import dataclass

from herdling.recipes.settings import Stage


@dataclass(frozen=True, kw_only=True)
class Config(Stage):
    """Train a model from random weights on packed documents, text and images mixed."""

    data: str = "builtin"
    """What to train on, with weights: builtin, code, english, pictures, task names, files."""


def main(config: Config) -> int:
    from herdling.recipes import stage
    from herdling.tasks.mixture import makers

    stage.run(config, "pretrain", makers("document"))
    return 0
