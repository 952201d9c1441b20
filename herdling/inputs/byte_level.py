"""Bytes as printable characters: how byte-level BPE files spell their tokens.

The alphabet is GPT-2's (openai/gpt-2, `encoder.py`), used by every byte-level `tokenizer.json`:
bytes that print in Latin-1 stand for themselves, the other 68 for the characters from U+0100 up.
Also here: turning token bytes back into text without ever failing on fragments.
"""

import codecs
import re

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in set(_PRINTABLE)]

TO_CHARACTER = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(_OTHERS)}
_TO_LATIN1 = {ord(character): byte for byte, character in TO_CHARACTER.items()}


def spell(token: bytes) -> str:
    """The name that a token of these bytes has in `tokenizer.json`."""
    return token.decode("latin-1").translate(TO_CHARACTER)


def unspell(name: str) -> bytes:
    """The bytes behind a name; raises UnicodeEncodeError for a name outside the alphabet."""
    return name.translate(_TO_LATIN1).encode("latin-1")


def _surrogate_or_replacement(error: UnicodeError) -> tuple[str, int]:
    """Codec handler: a UTF-8 coded surrogate becomes that surrogate, anything else U+FFFD."""
    assert isinstance(error, UnicodeDecodeError)
    three = error.object[error.start : error.start + 3]
    if re.fullmatch(rb"\xed[\xa0-\xbf][\x80-\xbf]", three):
        return three.decode("utf-8", "surrogatepass"), error.start + 3
    return "\N{REPLACEMENT CHARACTER}", error.end


KEEP_SURROGATES = "herdling.surrogate"
codecs.register_error(KEEP_SURROGATES, _surrogate_or_replacement)
