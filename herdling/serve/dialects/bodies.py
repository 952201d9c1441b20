"""JSON bodies as objects, whatever clients send.

    body = await bodies.read(request)       # a dict, or ApiError 400

Read here and not by FastAPI, whose 422 no client of these APIs knows. NaN and infinities, which JSON
does not have, are refused; half surrogate pairs become U+FFFD, since no reply could carry them.
"""

import json
import re
from typing import Any, NoReturn

from fastapi import Request

from herdling.serve import errors

_HALVES = re.compile(rb"\\u[dD][89a-fA-F]")


async def read(request: Request) -> dict[str, Any]:
    """The JSON object in the body of a request. Raises ApiError 400."""
    body = parse(await request.body())
    if not isinstance(body, dict):
        raise errors.bad_request("the body must be a JSON object")
    return body


def parse(raw: bytes) -> Any:
    """Any JSON value. Raises ApiError 400."""
    try:
        value = json.loads(raw, parse_constant=_refuse)
    except RecursionError:
        raise errors.bad_request("the body is nested too deeply") from None
    except ValueError as problem:  # of the syntax, the encoding, or the length of a number
        raise errors.bad_request(f"the body is not JSON: {problem}") from None
    if _HALVES.search(raw):
        text = json.dumps(value, ensure_ascii=False)
        value = json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
