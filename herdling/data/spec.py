"""What `--data` says, and opening it.

    builtin                          all built-in text, and pictures for a model that sees
    code:2,english:1                 two thirds of the tokens are code
    books/*.txt,chats/*.jsonl:3      files; *.jsonl and *.parquet hold records, others plain text
    cats/                            a folder of captioned pictures
    hf/tatsu-lab/alpaca              a dataset of the Hugging Face hub, or of its cache
    saved/chats/                     a folder that `save_to_disk` of `datasets` wrote

Parts are separated by commas; a number after the last colon is the weight, 1 if absent. A name that
is not built in is a path, in which `*`, `?`, `[...]` and `**` stand for what they do in a shell.
"""

import glob
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from herdling.config import nearest
from herdling.data import embedded, hub, rendered
from herdling.data.pictures import PictureSource
from herdling.data.record_source import RecordSource, RecordTexts
from herdling.data.records import (
    InMemory,
    JsonLines,
    Records,
    image_folder,
    only_text,
    parquet_rows,
)
from herdling.data.sources import InMemory as InMemoryTexts
from herdling.data.sources import Source, Texts, TextSource
from herdling.data.text_files import TextFiles
from herdling.errors import ConfigError, DataError
from herdling.inputs.images import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer

_WEIGHT = re.compile(r"(.+):(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+)", re.ASCII)
_PACKED = (".7z", ".bz2", ".gz", ".lz4", ".tar", ".tgz", ".xz", ".zip", ".zst")
_BUILTIN_TEXT = {"code": 4.0, "english": 3.0, "multilingual": 3.0}
_BUILTIN_PICTURES = 3.0


@dataclass(frozen=True)
class Opening:
    """What every source needs to be told."""

    tok: Tokenizer
    split: str = "train"
    """train, validation, test; 'all' for built-in text and files."""
    seed: int = 0
    length: int | None = None
    """Tokens of a row: longer texts come in parts of a few rows, in random order."""
    processor: ImageProcessor | None = None
    """None for a model without vision."""
    encoding_errors: str = "strict"
    """What a byte that is not UTF-8 does: 'strict' stops, 'replace' makes it U+FFFD."""


Weighted = list[tuple[Source, float]]
Maker = Callable[[Opening], Weighted]
"""What opens a name; the weights are shares within the name."""


def parse(spec: str) -> list[tuple[str, float]]:
    """The names of a spec with their weights; raises ConfigError for a spec that names nothing."""
    parts = []
    for part in spec.split(","):
        matched = _WEIGHT.fullmatch(part.strip())
        name, weight = (matched[1], float(matched[2])) if matched else (part.strip(), 1.0)
        if not name:
            raise ConfigError(
                f"data is {spec!r}, which has an empty part; write such as code:2,a.txt"
            )
        if not 0 < weight < math.inf:
            raise ConfigError(
                f"weight of {name} is {weight:g}; it must be above 0 and finite, or leave it out"
            )
        parts.append((name, weight))
    return parts


def open_sources(
    spec: str, opening: Opening, makers: Mapping[str, Maker] | None = None
) -> Weighted:
    """The sources that a spec names, with weights for `Mixture`.

    `makers` are further names (tasks, for example); it may make some when they are asked for. Raises
    ConfigError for a name that is neither known nor a path, DataError for files that are missing or
    broken.
    """
    makers = makers or {}
    found: Weighted = []
    for name, weight in parse(spec):
        try:
            maker = makers[name]
        except KeyError:
            others = partial(_files, name, known=sorted({**_MAKERS, **makers}))
            maker = _MAKERS.get(name, others)
        made = maker(opening)
        total = sum(share for _, share in made)
        found += [(source, weight * share / total) for source, share in made]
    return found


def _cut(opening: Opening) -> int | None:
    # About four rows' worth of characters: parts are then mostly full rows, one text still fills
    # only a few rows of a window, and remainders of all lengths are there to fill the gaps.
    return None if opening.length is None else max(4096, 16 * opening.length)


def _text_source(name: str, texts: Texts, opening: Opening) -> Source:
    return TextSource(name, texts, opening.tok, seed=opening.seed, cut=_cut(opening))


def _builtin_text(domain: str, opening: Opening) -> Weighted:
    texts = [document.text for document in embedded.documents(domain, opening.split)]
    return [(_text_source(domain, InMemoryTexts(texts), opening), 1.0)]


def _picture(kind: str, opening: Opening) -> Weighted:
    if opening.processor is None:
        raise ConfigError(f"data picture/{kind}: the model has no vision; remedy: one that has")
    source = PictureSource(
        kind, opening.tok, opening.processor, split=opening.split, seed=opening.seed
    )
    return [(source, 1.0)]


def _pictures(opening: Opening) -> Weighted:
    return [made for kind in rendered.KINDS for made in _picture(kind, opening)]


def _builtin(opening: Opening) -> Weighted:
    found = [(_builtin_text(domain, opening)[0][0], w) for domain, w in _BUILTIN_TEXT.items()]
    if opening.processor is not None:
        made = _pictures(opening)
        found += [(source, _BUILTIN_PICTURES / len(made)) for source, _ in made]
    return found


_MAKERS: dict[str, Maker] = {
    "builtin": _builtin,
    "pictures": _pictures,
    **{domain: partial(_builtin_text, domain) for domain in embedded.DOMAINS},
    **{f"picture/{kind}": partial(_picture, kind) for kind in rendered.KINDS},
}


def _files(name: str, opening: Opening, known: Sequence[str]) -> Weighted:
    """The source of a path or pattern: its text files, or its records."""
    found = open_files(name, opening, known)
    if isinstance(found, TextFiles):
        return [(_text_source(name, found, opening), 1.0)]
    return [(_record_source(name, found, opening), 1.0)]


def open_files(name: str, opening: Opening, known: Sequence[str] = ()) -> TextFiles | Records:
    """What stands in the files of a path or pattern, or in a dataset of the hub.

    Raises ConfigError for a name that is none, nor one of `known`; DataError for broken files.
    """
    if name.startswith(hub.PREFIX) or hub.is_saved(Path(name)):
        return hub.HubRows(name, opening.split)
    if Path(name).is_dir():
        records = InMemory(image_folder(Path(name), opening.encoding_errors), opening.split)
        if not records.sizes:
            raise DataError(
                f"{name}: no captioned picture of split {opening.split!r}; "
                "for text files name them, such as folder/*.txt"
            )
        return records
    paths = [Path(path) for path in sorted(glob.glob(name, recursive=True)) if Path(path).is_file()]
    if Path(name).is_file():
        paths = [Path(name)]
    if not paths:
        raise ConfigError(_nothing(name, known))
    kinds = {_kind(path) for path in paths}
    if len(kinds) > 1:
        raise ConfigError(
            f"data {name!r} matches {' and '.join(sorted(kinds))}; name one kind each"
        )
    kind = kinds.pop()
    if kind == "text files":
        return TextFiles(paths, opening.split, opening.encoding_errors)
    if kind == "JSON lines":
        return JsonLines(paths, opening.split, opening.encoding_errors)
    return InMemory(parquet_rows(paths), opening.split)


def _nothing(name: str, known: Sequence[str]) -> str:
    """Why `name` opens nothing: a mistyped weight, a path, or a mistyped name."""
    before, colon, weight = name.rpartition(":")
    if colon and (before in known or glob.glob(before, recursive=True)):
        return f"weight of {before} is {weight!r}; it must be a number above 0, or leave it out"
    if not known or Path(name).name != name or Path(name).suffix or glob.has_magic(name):
        return f"data {name!r}: no such file"
    return f"data {name!r} is neither a file nor a known name{nearest(name, known)}"


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix == ".json":
        raise ConfigError(f"{path}: one JSON value is no stream of records; remedy: JSON lines")
    if suffix in _PACKED:  # its bytes are no text, and some would pass for it
        raise ConfigError(f"{path}: a packed file is not read; remedy: unpack it")
    if suffix == ".arrow":
        raise ConfigError(
            f"{path}: an Arrow file is not read alone; remedy: name the folder that save_to_disk wrote"
        )
    return {".jsonl": "JSON lines", ".ndjson": "JSON lines", ".parquet": "Parquet tables"}.get(
        suffix, "text files"
    )


def _record_source(name: str, records: Records, opening: Opening) -> Source:
    if only_text(records):
        return _text_source(name, RecordTexts(records), opening)
    return RecordSource(name, records, opening.tok, seed=opening.seed, processor=opening.processor)
