"""A tokenizer as GGUF metadata: byte-level BPE under llama.cpp's `llama4` splitting rule.

That rule stands for Llama 4's split pattern, but reads classes of characters more coarsely: combining
marks end a word, and only ASCII letters have a case (`docs/export.md` has the cases that differ).
"""

import json
from pathlib import Path

from herdling.errors import ConfigError
from herdling.export.gguf.writing import Fields
from herdling.inputs import chat, special_tokens
from herdling.inputs.tokenizer import SPLIT_PATTERN, Tokenizer

NORMAL, CONTROL, UNUSED = 1, 3, 5  # gguf's TokenType

# Metadata of a single token -> its name. eot and eom end a reply, as they do in `Tokenizer.stop_ids`.
ROLES = {
    "bos": special_tokens.BOS,
    "eos": special_tokens.END_OF_TEXT,
    "eot": special_tokens.EOT,
    "eom": special_tokens.EOM,
    "padding": special_tokens.PAD,
    "fim_pre": "<|fim_prefix|>",
    "fim_mid": "<|fim_middle|>",
    "fim_suf": "<|fim_suffix|>",
}


def vocabulary(folder: Path, rows: int) -> Fields:
    """The `tokenizer.*` fields of a model folder; `rows` is the embedding's height.

    Raises ConfigError for a tokenizer that llama.cpp would split differently altogether.
    """
    tok = Tokenizer.open(folder)
    raw = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    _check(raw, folder)
    tokens, kinds = [f"[UNUSED{i}]" for i in range(rows)], [UNUSED] * rows
    for text, id in raw["model"]["vocab"].items():
        tokens[id], kinds[id] = text, NORMAL
    for text, id in tok.specials.items():
        tokens[id], kinds[id] = text, CONTROL
    merges = raw["model"]["merges"]
    template = folder / "chat_template.jinja"
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
        **{
            f"tokenizer.ggml.{role}_token_id": tok.special(name)
            for role, name in ROLES.items()
            if tok.has_special(name)
        },
        "tokenizer.chat_template": (
            template.read_text("utf-8") if template.is_file() else chat.template()
        ),
    }


def _check(raw: dict, folder: Path) -> None:
    pattern = None
    stages = raw.get("pre_tokenizer") or {}
    for stage in stages.get("pretokenizers", [stages]):
        if stage.get("type") == "Split":
            pattern = (stage.get("pattern") or {}).get("Regex")
    if pattern != SPLIT_PATTERN:
        raise ConfigError(
            f"{folder / 'tokenizer.json'}: splits text by {pattern!r}; GGUF's llama4 rule is Llama "
            "4's pattern only"
        )
    if raw.get("normalizer") is not None:
        raise ConfigError(f"{folder / 'tokenizer.json'}: has a normalizer, which GGUF cannot say")
