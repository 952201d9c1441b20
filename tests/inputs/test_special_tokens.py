"""The list of control tokens against the table of ids in Meta's tokenizer."""

import pytest

from herdling.errors import ConfigError
from herdling.inputs import special_tokens

# Offset from begin_of_text, which is 200000 in Meta's own vocabulary.
PLACES = {
    "begin_of_text": 0,
    "end_of_text": 1,
    "fim_prefix": 2,
    "fim_suffix": 4,
    "header_start": 5,
    "header_end": 6,
    "eom": 7,
    "eot": 8,
    "step": 9,
    "text_post_train_reserved_special_token_0": 10,
    "text_post_train_reserved_special_token_5": 15,
    "python_start": 16,
    "python_end": 17,
    "finetune_right_pad": 18,
    "text_post_train_reserved_special_token_8": 19,
    "text_post_train_reserved_special_token_68": 79,
    "image_start": 80,
    "image_end": 81,
    "vision_reserved_special_token_1": 83,
    "tile_x_separator": 84,
    "tile_y_separator": 85,
    "vision_reserved_special_token_5": 89,
    "image": 90,
    "vision_reserved_special_token_6": 91,
    "patch": 92,
    "vision_reserved_special_token_7": 93,
    "vision_reserved_special_token_1047": 1133,
    "reasoning_reserved_special_token_0": 1134,
    "reasoning_thinking_start": 1142,
    "reasoning_thinking_end": 1143,
    "reserved_special_token_0": 1144,
    "reserved_special_token_903": 2047,
}


def test_full_list_is_in_the_original_order():
    names = special_tokens.names("full")
    assert len(names) == len(set(names)) == 2048
    assert {name: names.index(f"<|{name}|>") for name in PLACES} == PLACES


def test_compact_list_is_the_meaningful_part_in_the_same_order():
    full, compact = special_tokens.names("full"), special_tokens.names("compact")
    assert compact == [name for name in full if "reserved" not in name]
    assert len(compact) == 21


def test_unknown_list_is_an_error():
    with pytest.raises(ConfigError, match=r"'some'; use full .* or compact"):
        special_tokens.names("some")
