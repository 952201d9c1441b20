"""Users' records: JSON lines, Parquet tables and folders of captioned pictures.

A record is a JSON object with either

    {"text": "...", "images": ["cat.png"]}        a document to pretrain on; images come first
    {"messages": [{"role": ..., "content": ...}], "tools": [...]}      a conversation
    {"prompt": ..., "chosen": ..., "rejected": ..., "tools": [...]}    two answers, one of them better

`prompt` of a pair is text or messages, an answer is text or the messages of the assistant; without
`prompt` both answers are whole conversations that begin alike. A conversation may also have one of the
forms of `herdling.data.conversations`; `split` (train, validation or test) overrides the hash. A field
that is null is one that is not there. Images of a conversation are parts of its messages. Image paths
are relative to the file that names them; data URIs may stand in their place. Every record is checked
when its file is opened, and an error names the file and the line. JSON lines stay on disk; Parquet
rows are held in memory.
"""

import base64
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from herdling.data.conversations import ASKED, check_no_images, normal, with_system, with_tools
from herdling.data.split import SPLITS
from herdling.data.text_files import Stretches, decode, keeper, lines
from herdling.errors import DataError, InputError, require
from herdling.inputs import chat

PICTURES = (".bmp", ".gif", ".jpg", ".jpeg", ".jp2", ".png", ".ppm", ".tif", ".tiff", ".webp")
FIELDS = (
    "text", "images", "messages", "tools", "split", "conversations", "image", "system", "instruction",
    "input", "output", "history", "prompt", "completion", "question", "answer", "grader", "reply",
    "chosen", "rejected",
)  # fmt: skip
_NOT_TEXT_ALONE = -1

Found = tuple[str, Path, dict[str, Any]]
"""Where a record stands, what its image paths are relative to, and the record."""


class Records(Protocol):
    """A fixed collection of checked records."""

    @property
    def sizes(self) -> Sequence[int]:
        """Characters of each record, -1 for one that is more than a text."""
        ...

    def read(self, i: int) -> Found: ...


def only_text(records: Records) -> bool:
    """Whether no record has images or messages."""
    return _NOT_TEXT_ALONE not in records.sizes


class JsonLines:
    """The records of JSON-lines files that belong to a split; blank lines are passed over."""

    def __init__(self, paths: Sequence[Path], split: str = "all", errors: str = "strict") -> None:
        self._errors, keep = errors, keeper(split)
        self._stretches, self.sizes = Stretches(), array("q")
        for path in paths:
            for number, start, line in lines(path):
                if not line.strip():
                    continue
                record = checked(parse(line, errors, path, number), f"{path}:{number}", path.parent)
                if belongs(record, split, keep):
                    self._stretches.add(path, start, len(line), number)
                    self.sizes.append(size(record))

    def read(self, i: int) -> Found:
        place = self._stretches[i]
        where = f"{place.path}:{place.line}"
        record = parse(place.read(), self._errors, place.path, place.line)
        return where, place.path.parent, checked(record, where, place.path.parent)


class InMemory:
    """Records held as they are, those that belong to a split."""

    def __init__(self, found: Iterable[Found], split: str = "all") -> None:
        keep = keeper(split)
        self._found: list[Found] = []
        for where, folder, record in found:
            record = checked(record, where, folder)
            if belongs(record, split, keep):
                self._found.append((where, folder, record))
        self.sizes = array("q", (size(record) for _, _, record in self._found))

    def read(self, i: int) -> Found:
        return self._found[i]


def parquet_rows(paths: Sequence[Path]) -> Iterator[Found]:
    """Rows of Parquet tables, counted from 0; columns that a record does not have are not read."""
    parquet = require("pyarrow.parquet", "data")
    for path in paths:
        number = 0
        try:
            file = parquet.ParquetFile(path)
            columns = [name for name in file.schema_arrow.names if name in FIELDS]
            for batch in file.iter_batches(columns=columns):
                for i in range(batch.num_rows):
                    row = {name: batch.column(name)[i].as_py() for name in columns}
                    yield f"{path}: row {number}", path.parent, plain(row)
                    number += 1
        except (OSError, ValueError) as problem:
            reason = " ".join(str(problem).split())[:200]
            raise DataError(f"{path}: row {number}: not readable as Parquet: {reason}") from None


def plain(value: Any) -> Any:
    """A row of a table as a record: pictures as data URIs, and fields that are null left out.

    A table has every field of any row in all of them, in nested objects too.
    """
    if isinstance(value, Mapping):
        if set(value) == {"bytes", "path"}:
            if value["bytes"] is None:
                return value["path"]
            return "data:image/any;base64," + base64.b64encode(value["bytes"]).decode()
        return {key: plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value


def image_folder(folder: Path, errors: str = "strict") -> Iterator[Found]:
    """Records of a folder of captioned pictures; `errors` as in `decode`.

    Captions stand in `metadata.jsonl` as the `datasets` library has it (`file_name` and `text`), or
    beside each picture in a text file of the same name (`cat.png`, `cat.txt`).
    """
    listing = folder / "metadata.jsonl"
    if listing.is_file():
        for number, _, line in lines(listing):
            if line.strip():
                record = parse(line, errors, listing, number)
                if not isinstance(record, dict) or not isinstance(record.get("file_name"), str):
                    raise DataError(f"{listing}:{number}: has no file_name, the name of a picture")
                pair = {"text": record.get("text"), "images": [record["file_name"]]}
                yield f"{listing}:{number}", folder, pair
        return
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICTURES:
            caption = path.with_suffix(".txt")
            if not caption.is_file():
                raise DataError(f"{path}: has no caption; remedy: write {caption.name} beside it")
            text = decode(caption.read_bytes(), errors, caption, 1).strip()
            yield str(path), path.parent, {"text": text, "images": [path.name]}


def parse(raw: bytes, errors: str, path: Path, line: int) -> Any:
    """One line of JSON; raises DataError naming file and line."""
    try:
        return json.loads(decode(raw, errors, path, line), object_pairs_hook=_once)
    except json.JSONDecodeError as problem:  # its own line is that within this one
        where = f"column {len(problem.doc[: problem.pos].rstrip()) + 1}"
        raise DataError(f"{path}:{line}: not valid JSON: {problem.msg} at {where}") from None
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{path}:{line}: not valid JSON: {problem}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError for two values under one name, of which one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return found


def checked(record: Any, where: str, folder: Path) -> dict[str, Any]:
    """The record in normal form; raises DataError unless it is a document, a conversation or a pair
    whose images exist."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: is {type(record).__name__}; each record must be a JSON object")
    record = {name: value for name, value in record.items() if value is not None}
    try:
        if "chosen" in record:  # some datasets repeat one side as a conversation
            record = with_tools({k: v for k, v in record.items() if k != "messages"})
        else:
            record = normal(record)
    except DataError as problem:
        raise DataError(f"{where}: {problem}") from None
    kinds = [name for name in ("text", "messages", "chosen") if name in record]
    if len(kinds) != 1:
        names = ", ".join(sorted(record)[:8]) or "nothing"
        raise DataError(
            f"{where}: has {names}; a record has either 'text' or 'messages' or, as a pair, 'chosen' "
            "and 'rejected'"
        )
    if "text" in record:
        _check_document(record, where)
    elif "messages" in record:
        _check_conversation(record, where)
    else:
        _check_pair(record, where)
    if record.get("split", "train") not in SPLITS:
        raise DataError(f"{where}: split is {record['split']!r}; use one of {', '.join(SPLITS)}")
    check_images(record, where, folder)
    return record


def check_images(record: Mapping[str, Any], where: str, folder: Path) -> None:
    """Raise DataError unless all images of a record of checked structure are there."""
    for image in images_of(record):
        if not isinstance(image, str):
            raise DataError(
                f"{where}: image is {type(image).__name__}; it must be a path or a data URI"
            )
        if not is_data_uri(image) and not _is_file(folder / image):
            raise DataError(f"{where}: image {str(folder / image)[:300]} is not a file")


def _check_document(record: Mapping[str, Any], where: str) -> None:
    if not isinstance(record["text"], str):
        raise DataError(f"{where}: text is {type(record['text']).__name__}; it must be a string")
    paths = record.get("images")
    if paths is None:
        return
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise DataError(f"{where}: images must be a list of paths")


def _check_conversation(record: Mapping[str, Any], where: str) -> None:
    messages = record["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DataError(f"{where}: messages must be a list of objects with role and content")
    try:
        _check_messages(messages, record.get("tools"))
    except InputError as problem:
        raise DataError(f"{where}: {problem}") from None
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: no message has role 'assistant', so there is nothing to learn")
    if not any(chat.is_learnt(message) for message in messages):
        raise DataError(
            f"{where}: all the assistant says has weight 0, so there is nothing to learn"
        )


def _check_messages(messages: Sequence[Mapping[str, Any]], tools: Any) -> None:
    """Raise InputError for what cannot be rendered, and for replies that would be rendered without
    what they say."""
    chat.check(messages, tools)
    for i, message in enumerate(messages):
        for name, remedy in (
            ("function_call", "write it as tool_calls"),
            ("refusal", "write it as content"),
        ):
            if message.get(name):
                raise InputError(f"messages[{i}] has a {name}, which is not read; remedy: {remedy}")
        if "content" not in message and not message.get("tool_calls"):
            raise InputError(f"messages[{i}] has neither content nor tool_calls")


def _check_pair(record: Mapping[str, Any], where: str) -> None:
    try:
        check_no_images(record, "a pair")
        prompt, chosen, rejected = sides(record)
        for answer in (chosen, rejected):
            _check_messages([*prompt, *answer], record.get("tools"))
    except (InputError, DataError) as problem:
        raise DataError(f"{where}: {problem}") from None
    if chosen == rejected:
        raise DataError(f"{where}: chosen and rejected are the same answer")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[-1]["role"] != "assistant":
            raise DataError(f"{where}: {name} must end with what the assistant says")
    if not prompt or any(answer[0]["role"] in ("system", "user") for answer in (chosen, rejected)):
        raise DataError(
            f"{where}: chosen and rejected do not answer the same question; remedy: give it as "
            "'prompt', or at the beginning of both"
        )
    if not any(message.get("content") or message.get("tool_calls") for message in chosen):
        raise DataError(f"{where}: chosen is empty")
    given = _turns(record, "prompt", "user") if record.get("prompt") is not None else []
    if not all(_said(message) in map(_said, prompt) for message in given):
        raise DataError(
            f"{where}: prompt is not what chosen and rejected begin with; remedy: leave it out, or "
            "give the answers alone"
        )


def _said(message: Mapping[str, Any]) -> Any:
    """Role and content, so that text is the same with white space around it."""
    content = message.get("content")
    return message["role"], content.strip() if isinstance(content, str) else content


class Sides(NamedTuple):
    """A preference pair as messages."""

    prompt: list[dict[str, Any]]
    chosen: list[dict[str, Any]]
    rejected: list[dict[str, Any]]


def sides(record: Mapping[str, Any]) -> Sides:
    """The parts of a pair; where answers are whole conversations, the prompt is what both begin with.

    Raises InputError for a part that is neither text nor messages.
    """
    chosen, rejected = (_turns(record, name, "assistant") for name in ("chosen", "rejected"))
    # Some datasets repeat the prompt in both conversations.
    if record.get("prompt") is not None and all(
        answer[:1] and answer[0]["role"] == "assistant" for answer in (chosen, rejected)
    ):
        return Sides(with_system(record, _turns(record, "prompt", "user")), chosen, rejected)
    alike = 0
    # The last turn of each is the answer, even if the other goes on from it.
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one != other:
            break
        alike += 1
    prompt = with_system(record, chosen[:alike]) if alike else []
    return Sides(prompt, chosen[alike:], rejected[alike:])


def _turns(record: Mapping[str, Any], name: str, role: str) -> list[dict[str, Any]]:
    value = record.get(name)
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(m, dict) and "role" in m for m in value):
        raise InputError(f"{name} must be text or a list of messages with role and content")
    return value


def images_of(record: Mapping[str, Any]) -> list[Any]:
    """What a record of checked structure gives as its images, in order."""
    found = list(record.get("images") or [])
    pair = [m for side in sides(record) for m in side] if "chosen" in record else []
    for message in [*record.get("messages", []), *pair]:
        parts = message.get("content")
        for part in parts if isinstance(parts, list) else []:
            if part["type"] != "text":
                found.append(chat.image_of(part))
    return found


def located(image: str, folder: Path) -> str:
    """What to open for an image of a record: the data URI itself, or the path from `folder`."""
    return image if is_data_uri(image) else str(folder / image)


def resolved(message: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The message, checked before, with relative image paths resolved against `folder`."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    parts = []
    for part in content:
        if part["type"] != "text":
            part = {**part, "image": located(chat.image_of(part), folder)}
        parts.append(part)
    return {**message, "content": parts}


def is_data_uri(image: str) -> bool:
    return image[:5].lower() == "data:"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long
        return False


def content(record: Mapping[str, Any]) -> str:
    """What decides the split of a record: two records of the same content are in the same one.

    Of a task's item and of a pair it is the question: another answer to it is not another question, and
    a file is split the same whether it is trained on or asked.
    """
    if "chosen" in record:
        return json.dumps(sides(record).prompt)
    messages = record.get("messages")
    if ASKED in record and messages is not None:
        messages = messages[: record[ASKED]]
    return json.dumps([record.get("text"), messages, record.get("images") or []])


def belongs(record: Mapping[str, Any], split: str, keep: Callable[[str], bool]) -> bool:
    """Whether a record is of `split`, by its own word or by its content."""
    own = record.get("split")
    return keep(content(record)) if own is None else split in ("all", own)


def size(record: Mapping[str, Any]) -> int:
    """Characters of a record that is nothing but text, else -1."""
    alone = "text" in record and not record.get("images")
    return len(record["text"]) if alone else _NOT_TEXT_ALONE
