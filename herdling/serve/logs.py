"""Log lines: JSON to a pipe, plain to a terminal; one line a call, with timings and no content.

`note` adds fields to the line of the call that is being answered, from wherever that happens.
"""

import contextvars
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

access = logging.getLogger("herdling.serve.access")
_fields: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar(
    "fields", default=None
)


@contextmanager
def call(**fields: Any) -> Iterator[dict[str, Any]]:
    """Collect the fields of one call; the caller logs them."""
    token = _fields.set(fields)
    try:
        yield fields
    finally:
        _fields.reset(token)


def note(**fields: Any) -> None:
    """Add to the current call's line; numbers given before are added up."""
    current = _fields.get()
    if current is None:
        return
    for name, value in fields.items():
        old = current.get(name)
        if isinstance(value, int | float) and isinstance(old, int | float):
            value = old + value
        current[name] = value


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and the fields of a call."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class Plain(logging.Formatter):
    """The same for people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        more = " ".join(f"{k}={_short(v)}" for k, v in fields.items() if v is not None)
        return f"{super().format(record)} {more}".rstrip()


def _short(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def set_up(level: str = "info", form: str = "auto") -> None:
    """Send the server's logs, and uvicorn's, to stderr: `json`, `plain`, or by what stderr is."""
    handler = logging.StreamHandler(sys.stderr)
    plain = form == "plain" or (form == "auto" and sys.stderr.isatty())
    handler.setFormatter(Plain() if plain else JsonLines())
    for name in ("herdling", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers[:], logger.propagate = [handler], False
        logger.setLevel(level.upper())
    # Its lines on starting and stopping say what ours do.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
