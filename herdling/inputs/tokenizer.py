"""Text to ids and back: byte-level BPE with Llama 4's split pattern and control tokens.

    tok = Tokenizer.open(folder)                   # tokenizer.json, as transformers reads it
    tok = Tokenizer.from_tiktoken("tokenizer.model")
    tok = Tokenizer.train(texts, vocab_size=4096)
    tok.decode(tok.encode(text)) == text           # for every str, lone surrogates included

`encode` knows no control tokens at all, so nothing a user types can become one; they are reached
by name only: `tok.special("<|patch|>")`.
"""

import codecs
import functools
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from herdling.errors import CheckpointError, ConfigError
from herdling.files import atomic_file, write_json
from herdling.inputs import special_tokens, tiktoken_file
from herdling.inputs.byte_level import KEEP_SURROGATES, TO_CHARACTER, unspell

log = logging.getLogger(__name__)

_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]%s[{_LOWER}]%s(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# o200k's rules (openai/tiktoken), which Llama 4 took over: words in two letter cases, numbers of up
# to three digits, symbols, line ends, other white space.
SPLIT_PATTERN = "|".join(
    [
        _WORD % ("*", "+"),
        _WORD % ("+", "*"),
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
# From this size on, 2048 control tokens are at most half of the vocabulary.
FULL_FROM = 4096

_SURROGATES = re.compile("([\ud800-\udfff]+)")
_BETWEEN_DIGITS = re.compile(r"(?<=\d)(?=\d)")
_UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()


class Tokenizer:
    """A byte-level BPE vocabulary with control tokens that only `special` reaches."""

    def __init__(self, full: tokenizers.Tokenizer, source: str = "tokenizer") -> None:
        """Wrap a loaded `tokenizers` object; `source` names it in errors.

        Raises CheckpointError when it is not byte-level BPE with all 256 bytes.
        """
        self._full = full
        self._source = source
        if not isinstance(full.model, models.BPE):
            raise CheckpointError(f"{source}: the model is not BPE; Llama 4 uses byte-level BPE")
        # The same model without added tokens: to it, "<|eot|>" is seven characters.
        self._plain = tokenizers.Tokenizer(full.model)
        if full.pre_tokenizer is not None:
            self._plain.pre_tokenizer = full.pre_tokenizer
        if full.normalizer is not None:
            self._plain.normalizer = full.normalizer
        added = full.get_added_tokens_decoder()
        self._special = {token.content: id for id, token in added.items()}
        text = self._plain.get_vocab()
        self._bytes = [_UNKNOWN] * (1 + max([*text.values(), *added], default=-1))
        for id, token in added.items():
            self._bytes[id] = token.content.encode()
        for name, id in text.items():
            if id not in added:
                self._bytes[id] = _bytes_of(name, source)
        self._byte_ids = [text.get(TO_CHARACTER[byte], -1) for byte in range(256)]
        if -1 in self._byte_ids:
            raise CheckpointError(
                f"{source}: byte 0x{self._byte_ids.index(-1):02x} has no token of its own, so it is "
                "not byte-level BPE"
            )

    # ---- where tokenizers come from and go to

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Read `tokenizer.json` of a model folder. Raises CheckpointError if it is unusable."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            remedy = (
                f"; {path.with_name('tokenizer.model')} is there: see Tokenizer.from_tiktoken"
                if path.with_name("tokenizer.model").is_file()
                else "; is this a model folder?"
            )
            raise CheckpointError(f"{path}: no such file{remedy}")
        try:
            full = tokenizers.Tokenizer.from_file(str(path))
        except Exception as problem:  # `tokenizers` raises bare Exception for all broken content
            raise CheckpointError(f"{path}: not a usable tokenizer.json: {problem}") from None
        return cls(full, str(path))

    @classmethod
    def from_tiktoken(cls, path: Path | str, specials: str = "full") -> Self:
        """Convert Meta's `tokenizer.model`; its 200,000 ranks and 2048 control tokens are 202,048.

        Raises CheckpointError naming the broken line.
        """
        vocab, merges = tiktoken_file.vocab_and_merges(tiktoken_file.read_ranks(path))
        # tiktoken takes a piece that is a token whole, without asking how it merges.
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=True)
        return cls(_with_specials(model, special_tokens.names(specials)), str(path))

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        specials: str | None = None,
        single_digits: bool = False,
    ) -> Self:
        """Learn merges from `texts`; the same texts give the same tokenizer.

        `vocab_size` counts everything: 256 bytes, merges, control tokens. `specials` is "full"
        (2048) or "compact" (21); by default full from a vocabulary of 4096 up, compact below. The
        result is smaller than asked, with a logged warning, if the texts run out of pairs to merge.
        With `single_digits` no merge joins two digits: small models then read and reckon with ten
        digits instead of a thousand numbers. The split pattern stays Llama 4's.
        Raises ConfigError for a size without room for the bytes and the control tokens.
        """
        kind = specials or ("full" if vocab_size >= FULL_FROM else "compact")
        names = special_tokens.names(kind)
        room = vocab_size - len(names)
        if room < 256:
            raise ConfigError(
                f"vocab_size is {vocab_size}; 256 bytes and {len(names)} {kind} control tokens need "
                f"at least {256 + len(names)}" + ("; or use compact" if kind == "full" else "")
            )
        learner = _with_specials(models.BPE(), [])
        trainer = trainers.BpeTrainer(
            vocab_size=room,
            show_progress=False,
            initial_alphabet=list(TO_CHARACTER.values()),
        )
        clean = (_SURROGATES.sub("", text) for text in texts)
        if single_digits:  # in every script; digits apart still teach their own bytes
            clean = (_BETWEEN_DIGITS.sub(" ", text) for text in clean)
        learner.train_from_iterator(clean, trainer)
        tok = cls(_with_specials(learner.model, names))
        if len(tok) < vocab_size:
            log.warning(
                "the texts gave a vocabulary of %d, not %d: there was no further pair to merge",
                len(tok),
                vocab_size,
            )
        return tok

    def save(self, folder: Path | str) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, as transformers' AutoTokenizer reads.

        There, as in Meta's encoder, a text starts with begin_of_text unless asked otherwise.
        """
        folder = Path(folder)
        with atomic_file(folder / "tokenizer.json") as temporary:
            temporary.write_text(self._full.to_str(pretty=True), "utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": special_tokens.BOS,
            "eos_token": special_tokens.END_OF_TEXT,
            "pad_token": special_tokens.PAD,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        for role in ("bos_token", "eos_token", "pad_token"):
            config[role] = self.name(self.special(str(config[role])))
        write_json(folder / "tokenizer_config.json", config)

    # ---- text

    def encode(self, text: str) -> list[int]:
        """Ids of `text`: no begin_of_text, and never a control token, whatever the text says.

        Takes time in proportion to the length for any text. A lone surrogate, which UTF-8 has no
        code for, becomes three byte tokens that `decode` turns back.
        """
        try:
            return self._plain.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError:
            if not isinstance(text, str):
                raise
        ids: list[int] = []
        for i, run in enumerate(_SURROGATES.split(text)):
            if i % 2:
                ids += [self._byte_ids[byte] for byte in run.encode("utf-8", "surrogatepass")]
            elif run:
                ids += self._plain.encode_batch_fast([run], add_special_tokens=False)[0].ids
        return ids

    def decode(self, ids: Iterable[int], surrogates: bool = True) -> str:
        """The text of `ids`, control tokens by name. Never raises for byte fragments.

        Bytes that are no UTF-8, and ids beyond the vocabulary, become U+FFFD. So do the three-byte
        forms of surrogates unless `surrogates`; pass False for text that must be valid Unicode,
        such as a reply that goes to a terminal or over a wire.
        """
        return self.to_bytes(ids).decode("utf-8", KEEP_SURROGATES if surrogates else "replace")

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids` joined; a control token gives its name."""
        table, size = self._bytes, len(self._bytes)
        return b"".join(table[i] if 0 <= i < size else _UNKNOWN for i in ids)

    def __len__(self) -> int:
        """Rows that an embedding needs: the highest id, plus one."""
        return len(self._bytes)

    # ---- control tokens

    def special(self, name: str) -> int:
        """Id of a control token such as `<|patch|>`; names used before are understood.

        Raises ConfigError if this tokenizer has no such token.
        """
        for candidate in (name, special_tokens.OLD_NAMES.get(name, name)):
            if candidate in self._special:
                return self._special[candidate]
        raise ConfigError(
            f"{self._source} has no control token {name}; it has {len(self._special)}"
            + ("" if len(self._special) > 40 else ": " + " ".join(self._special))
        )

    def has_special(self, name: str) -> bool:
        """Whether `special(name)` would find an id."""
        return bool({name, special_tokens.OLD_NAMES.get(name, name)} & self._special.keys())

    def name(self, id: int) -> str:
        """The control token of this id, by the name it has in this tokenizer."""
        return self._bytes[id].decode()

    @property
    def specials(self) -> dict[str, int]:
        """Every control token and its id."""
        return dict(self._special)

    @functools.cached_property
    def bos(self) -> int:
        """`<|begin_of_text|>`, first in every document."""
        return self.special(special_tokens.BOS)

    @functools.cached_property
    def end_of_text(self) -> int:
        """`<|end_of_text|>`, after a document; base models stop with it."""
        return self.special(special_tokens.END_OF_TEXT)

    @functools.cached_property
    def eot(self) -> int:
        """`<|eot|>`, after a chat message."""
        return self.special(special_tokens.EOT)

    @functools.cached_property
    def eom(self) -> int:
        """`<|eom|>`, after a message that calls a tool or carries its result."""
        return self.special(special_tokens.EOM)

    @functools.cached_property
    def pad(self) -> int:
        """`<|finetune_right_pad|>`, which fills rows of unequal length."""
        return self.special(special_tokens.PAD)

    @functools.cached_property
    def patch(self) -> int:
        """`<|patch|>`, whose embedding an image feature replaces."""
        return self.special(special_tokens.PATCH)

    @functools.cached_property
    def stop_ids(self) -> list[int]:
        """Ids that end a reply: end_of_text, eom and eot, those of them that exist."""
        names = (special_tokens.END_OF_TEXT, special_tokens.EOM, special_tokens.EOT)
        return [self.special(name) for name in names if self.has_special(name)]


class StreamDecoder:
    """Text of a stream of ids: bytes wait until they are whole characters.

    The pieces joined are `tok.decode(ids, surrogates=False)`.
    """

    def __init__(self, tok: Tokenizer) -> None:
        self._tok = tok
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, *ids: int) -> str:
        """The characters that these ids complete; may be empty."""
        return self._utf8.decode(self._tok.to_bytes(ids))

    def flush(self) -> str:
        """End of the stream: an unfinished character becomes U+FFFD."""
        return self._utf8.decode(b"", final=True)


def _bytes_of(name: str, source: str) -> bytes:
    try:
        return unspell(name)
    except UnicodeEncodeError:
        raise CheckpointError(
            f"{source}: token {name!r} is not spelled in the byte-level alphabet; Herdling reads "
            "byte-level BPE only"
        ) from None


def _with_specials(model: models.Model, names: list[str]) -> tokenizers.Tokenizer:
    full = tokenizers.Tokenizer(model)
    full.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    full.decoder = decoders.ByteLevel()
    full.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    if names:
        bos = special_tokens.BOS
        full.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, full.token_to_id(bos))],
        )
    return full
