"""The control tokens of Llama 4, in the order in which they follow the text vocabulary.

Source: meta-llama/llama-models, `models/llama4/tokenizer.py`; with Meta's 200,000 text tokens the
first of them is id 200000. 2048 names, of which 21 mean something; the others are reserved rows.
"""

from herdling.errors import ConfigError

BOS = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
HEADER_START = "<|header_start|>"
HEADER_END = "<|header_end|>"
EOM = "<|eom|>"
EOT = "<|eot|>"
PYTHON_START = "<|python_start|>"
PYTHON_END = "<|python_end|>"
PAD = "<|finetune_right_pad|>"
IMAGE = "<|image|>"
PATCH = "<|patch|>"

# A string holds meaningful names; (kind, first, last) is a run of reserved ones.
_LAYOUT: tuple[str | tuple[str, int, int], ...] = (
    "begin_of_text end_of_text fim_prefix fim_middle fim_suffix",
    "header_start header_end eom eot step",
    ("text_post_train_", 0, 5),
    "python_start python_end finetune_right_pad",
    ("text_post_train_", 8, 68),
    "image_start image_end",
    ("vision_", 0, 1),
    "tile_x_separator tile_y_separator",
    ("vision_", 2, 5),
    "image",
    ("vision_", 6, 6),
    "patch",
    ("vision_", 7, 1047),
    ("reasoning_", 0, 7),
    "reasoning_thinking_start reasoning_thinking_end",
    ("", 0, 903),
)

# Names that early files gave to the same rows (llama-models f62cac6 and 823cd86; the pad name is
# what transformers' conversion script passes).
OLD_NAMES = {
    PYTHON_START: "<|text_post_train_reserved_special_token_6|>",
    PYTHON_END: "<|text_post_train_reserved_special_token_7|>",
    PAD: "<|finetune_right_pad_id|>",
}


def names(kind: str) -> list[str]:
    """The control tokens in id order: `full` is all 2048, `compact` the 21 that mean something."""
    if kind not in ("full", "compact"):
        raise ConfigError(f"specials is {kind!r}; use full (2048 tokens) or compact (21 tokens)")
    found: list[str] = []
    for entry in _LAYOUT:
        if isinstance(entry, str):
            found += [f"<|{name}|>" for name in entry.split()]
        elif kind == "full":
            family, first, last = entry
            found += [f"<|{family}reserved_special_token_{i}|>" for i in range(first, last + 1)]
    return found
