"""Built-in text: what every machine with Herdling already holds, read where it lies.

    documents("code", "train")          # the Python standard library's source files
    documents("english", "validation")  # its documentation strings and the topics of help()
    documents("multilingual", "test")   # names, dates and units of CLDR in some 240 languages
    texts("train", limit=8_000_000)     # all of them in turn, as a tokenizer wants them

No module is run to be read. A document's name decides its split, and the documentation strings of a
file go by the file's name, so prose in the test split is not in the code that is trained on. The
same Python and the same Babel give the same documents.
"""

import ast
import functools
import sysconfig
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from herdling.data import multilingual
from herdling.data.split import SPLITS, split_of
from herdling.errors import ConfigError, DataError

DOMAINS = ("code", "english", "multilingual")

# Tests (absent from many installations), vendored packages, and tables of characters or messages
# that are data rather than code. lib2to3 holds second copies of other modules.
_SKIP_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "__pycache__"}
    | {"encodings", "lib2to3", "msilib", "pydoc_data"}
)
_SKIP_FILES = ("_sysconfigdata", "_sysconfig_vars")  # they hold paths of this machine
_DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Document:
    """One text, and the name that decides its split."""

    name: str
    text: str


def documents(domain: str, split: str = "all") -> Sequence[Document]:
    """The documents of 'code', 'english' or 'multilingual' in a split (or 'all'), sorted by name.

    The first call of a domain reads it: one to three seconds, and up to 10 MB that stay in memory.
    Raises ConfigError for an unknown domain or split, DataError when there is no source to read.
    """
    if domain not in DOMAINS:
        raise ConfigError(f"domain is {domain!r}; built-in text has {', '.join(DOMAINS)}")
    if split not in (*SPLITS, "all"):
        raise ConfigError(f"split is {split!r}; use one of {', '.join(SPLITS)}, all")
    return _by_split(domain)[split]


def texts(
    split: str = "train", limit: int | None = None, domains: Sequence[str] = DOMAINS
) -> Iterator[str]:
    """Texts of several domains, equally many bytes of each as long as it lasts.

    Stops at `limit` bytes of UTF-8 in all, cutting the last text there. Deterministic.
    """
    # Names sort folder by folder, their checksums do not: a limited sample has something of each.
    waiting = {
        domain: iter(sorted(documents(domain, split), key=lambda d: zlib.crc32(d.name.encode())))
        for domain in domains
    }
    given = dict.fromkeys(waiting, 0)
    while waiting:
        domain = min(waiting, key=given.__getitem__)
        document = next(waiting[domain], None)
        if document is None:
            del waiting[domain]
            continue
        raw = document.text.encode("utf-8")
        if limit is not None:
            raw = raw[: limit - sum(given.values())]
        given[domain] += len(raw)
        yield raw.decode("utf-8", "ignore")  # only a character that the limit cuts is ignored
        if limit is not None and sum(given.values()) >= limit:
            return


@functools.cache
def _by_split(domain: str) -> dict[str, list[Document]]:
    """All documents of a domain by split, and under 'all'."""
    found = sorted(_READERS[domain](), key=lambda document: document.name)
    sorted_out: dict[str, list[Document]] = {name: [] for name in SPLITS}
    for document in found:
        sorted_out[split_of(document.name)].append(document)
    return {**sorted_out, "all": found}


@functools.cache
def _sources() -> dict[str, str]:
    """Text of the standard library's modules by path relative to it."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _SKIP_FOLDERS.isdisjoint(relative.parts) and not path.name.startswith(_SKIP_FILES):
            # Every module of the library declares or defaults to UTF-8.
            found[relative.as_posix()] = path.read_bytes().decode("utf-8")
    if not found:
        raise DataError(
            f"{root}: the standard library has no source files here; remedy: use a Python that "
            "ships them, or your own --data"
        )
    return found


def _code() -> Iterator[Document]:
    return (Document(name, text) for name, text in _sources().items() if text.strip())


def _english() -> Iterator[Document]:
    for name, text in _sources().items():
        strings = _docstrings(text)
        if strings:
            yield Document(name, "\n\n".join(strings) + "\n")
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield Document(f"topics/{name}", text)


def _docstrings(source: str) -> list[str]:
    """Documentation strings in source order, those of at least five words."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in strings, which are not ours to mend
        tree = ast.parse(source)
    found: list[str] = []
    _collect(tree, found)
    return [text for text in found if len(text.split()) >= 5]


def _collect(node: ast.AST, found: list[str]) -> None:
    if isinstance(node, _DEFINITIONS):
        found.append(ast.get_docstring(node) or "")
    for child in ast.iter_child_nodes(node):
        # Only statements hold definitions; walking every expression would take half as long again.
        if isinstance(child, ast.stmt | ast.excepthandler):
            _collect(child, found)


def _multilingual() -> Iterator[Document]:
    return (Document(name, text) for name, text in multilingual.pages())


_READERS = {"code": _code, "english": _english, "multilingual": _multilingual}
