"""The bodies that MLflow sends to `/invocations`, as rows.

    frames.rows({"dataframe_split": {"columns": ["prompt"], "data": [["Hi"]]}})   # [{"prompt": "Hi"}]
    frames.from_csv("prompt\\nHi\\n")                                              # the same

Exactly one of `dataframe_split`, `dataframe_records`, `instances` and `inputs`. A row is a text, a list
of chat messages, or an object with one of them under the name of a column. Columns of `inputs` or
`instances` ({"prompt": [...]}) are turned into rows.
"""

import csv
import io
from collections.abc import Mapping
from typing import Any

from herdling.serve import errors
from herdling.serve.dialects import fields

FORMATS = ("dataframe_split", "dataframe_records", "instances", "inputs")
TEXT_COLUMNS = ("prompt", "inputs", "input", "text", "content", "query", "question")


def rows(body: Mapping[str, Any]) -> list[Any]:
    """The rows of a body. Raises ApiError 400."""
    given = [name for name in FORMATS if name in body]
    if len(given) != 1:
        found = f"; there are {' and '.join(given)}" if given else ""
        raise errors.bad_request(f"the body must hold exactly one of {', '.join(FORMATS)}{found}")
    name, value = given[0], body[given[0]]
    if name == "dataframe_split":
        return _split(fields.of(value, dict, name))
    if name == "dataframe_records":
        return list(fields.objects(fields.of(value, list, name), name))
    if isinstance(value, Mapping) and _is_columns(value):
        return _columns(value, name)
    return value if isinstance(value, list) else [value]


def from_csv(text: str) -> list[Any]:
    """The rows of a table with a header line. Raises ApiError 400."""
    try:
        lines = [line for line in csv.reader(io.StringIO(text), strict=True) if line]
    except csv.Error as problem:
        raise errors.bad_request(f"the body is not CSV: {problem}") from None
    if not lines:
        raise errors.bad_request("the body is empty; send a header line and rows")
    return _split({"columns": lines[0], "data": lines[1:]})


def read(row: Any, i: int) -> str | list[dict[str, Any]]:
    """The text or the messages of a row. Raises ApiError 400 naming the row."""
    if isinstance(row, str):
        return row
    where = f"row {i}"
    if isinstance(row, list):
        return fields.objects(row, where)
    if not isinstance(row, Mapping):
        raise errors.bad_request(f"{where} is {fields.brief(row)}; it must be a text or an object")
    if "messages" in row:
        return fields.objects(fields.need(row, "messages", list, where + "."), where + ".messages")
    texts = [name for name, value in row.items() if isinstance(value, str)]
    named = [name for name in TEXT_COLUMNS if name in texts]
    if not named and len(texts) != 1:
        raise errors.bad_request(
            f"{where} has no column that is clearly its text; call it prompt (or messages)"
        )
    return row[named[0] if named else texts[0]]


def _split(frame: Mapping[str, Any]) -> list[Any]:
    data = fields.need(frame, "data", list, "dataframe_split.")
    columns = fields.get(frame, "columns", list, "dataframe_split.")
    found = []
    for i, values in enumerate(data):
        values = fields.of(values, list, f"row {i}")
        names = list(range(len(values))) if columns is None else columns
        if len(values) != len(names):
            raise errors.bad_request(f"row {i} has {len(values)} values for {len(names)} columns")
        found.append({str(name): value for name, value in zip(names, values, strict=True)})
    return found


def _is_columns(value: Mapping[str, Any]) -> bool:
    """Messages are a list, but of one row."""
    lists = all(isinstance(column, list) for column in value.values())
    return bool(value) and lists and "messages" not in value


def _columns(columns: Mapping[str, list[Any]], name: str) -> list[Any]:
    lengths = {len(values) for values in columns.values()}
    if len(lengths) != 1:
        raise errors.bad_request(f"the columns of {name} differ in length")
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
