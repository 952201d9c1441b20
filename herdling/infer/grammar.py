"""What a reply must match: a JSON schema, a regular expression, or a grammar."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Grammar:
    """A language that the reply must belong to."""

    kind: Literal["json_schema", "json", "regex", "lark"]
    """`json` is any JSON object, and needs no text."""
    text: str = ""
