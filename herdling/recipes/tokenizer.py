"""From text to a tokenizer folder.

Run: herdling tokenizer --data builtin --out runs/tok --vocab-size 4096 [--specials compact]
     herdling tokenizer --data 'books/*.txt,chats/*.jsonl:2' --out runs/tok

Writes tokenizer.json, tokenizer_config.json and chat_template.jinja. Data is named as for every
other verb, so weights and splits hold here too; of pictures with text the text is read.
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from herdling.errors import ConfigError, DataError
from herdling.files import atomic_file, check_folder
from herdling.inputs import chat, special_tokens
from herdling.inputs.image_processor import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer

if TYPE_CHECKING:
    from herdling.data.spec import Opening, Weighted


@dataclass(frozen=True)
class Config:
    """Train a byte-level BPE with the Llama 4 split pattern and special tokens."""

    data: str
    """What to read: builtin, code, english, multilingual, or files, with weights (code:2,a.txt)."""
    out: Path
    """Folder to write."""
    vocab_size: int = 32768
    """Ids in all: 256 bytes, merges and control tokens."""
    specials: Literal["full", "compact"] | None = None
    """Control tokens, all 2048 or the 21 that mean something; default: full from 4096 ids up."""
    single_digits: bool = False
    """Never join two digits into one token, as small models that reckon prefer."""
    limit: int = 16_000_000
    """Bytes of text to read at most; data that ends before is read once."""
    split: Literal["train", "all"] = "train"
    """Which part of files and built-in text to read."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """What a byte of your files that is not UTF-8 does: stop, or become U+FFFD."""


def main(config: Config) -> None:
    """Train and save. Raises ConfigError for impossible sizes, DataError for unusable data."""
    if config.limit < 1:
        raise ConfigError(f"limit is {config.limit}; it must be at least 1 byte")
    if (config.out / "config.json").exists():
        raise ConfigError(
            f"{config.out} holds a model, which a new tokenizer would break; use another --out"
        )
    check_folder(config.out, "out")
    start = time.perf_counter()
    texts = list(read_texts(config.data, config.limit, config.split, config.encoding_errors))
    if not texts:
        raise DataError(f"data {config.data!r} holds no text to learn from")
    tok = Tokenizer.train(texts, config.vocab_size, config.specials, config.single_digits)
    tok.save(config.out)
    with atomic_file(config.out / "chat_template.jinja") as temporary:
        temporary.write_text(chat.template(), "utf-8")
    sample = "".join(itertools.islice(texts, 200))[:1_000_000]
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    ratio = len(sample.encode("utf-8", "surrogatepass")) / len(tok.encode(sample))
    print(
        f"{config.out}: {len(tok)} tokens ({len(tok.specials)} control) from {size / 1e6:.1f} MB in "
        f"{time.perf_counter() - start:.0f} s; {ratio:.2f} bytes per token on that text"
    )


def _builtin_texts(opening: "Opening") -> "Weighted":
    from herdling.data.spec import open_sources

    # Rendered pictures never end, so with them nothing would be read just once.
    return open_sources("builtin", replace(opening, processor=None))


class _Bytes(Tokenizer):
    """No merges: every id is a byte, so that any source gives its text through it."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogatepass").translate(bytes(self._byte_ids)))


def read_texts(
    data: str, limit: int, split: str = "train", encoding_errors: str = "strict"
) -> Iterator[str]:
    """Texts of the sources that `data` names, by their weights, up to `limit` bytes.

    Stops earlier once each source has been read. Control tokens and pictures are left out, and
    `builtin` is its texts alone.
    """
    from herdling.data.mixture import Mixture
    from herdling.data.spec import Opening, open_sources

    raw = _Bytes.train([], 256 + len(special_tokens.names("compact")))
    byte_of = np.frombuffer(raw.to_bytes(range(256)), dtype=np.uint8)  # (256,)
    # A source with pictures gives its text only along with their tiles, so those are made small.
    small = ImageProcessor(size=32, patch_size=16, max_tiles=1)
    opening = Opening(raw, split, processor=small, encoding_errors=encoding_errors)
    sources = open_sources(data, opening, {"builtin": _builtin_texts})
    mixture = Mixture(sources)
    unread = {i: source.size for i, (source, _) in enumerate(sources)}
    left = limit
    while left > 0 and unread:
        number, index, example = mixture.next()
        size = unread.get(number)
        if size is not None and index + 1 >= size:
            del unread[number]
        ids = np.array(example.tokens)
        for run in np.split(ids, np.flatnonzero(ids >= len(byte_of))):
            some = byte_of[run[run < len(byte_of)][:left]].tobytes()
            text = some.decode("utf-8", "ignore")  # a character that the limit cuts, a surrogate
            left -= len(some)
            if text:
                yield text
