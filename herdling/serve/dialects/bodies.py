"""JSON bodies as objects, whatever clients send.

    body = await bodies.read(request)       # a dict, or ApiError 400

Read here and not by FastAPI, whose 422 no client of these APIs knows. NaN and infinities, which JSON
does not have, are refused; half surrogate pairs become U+FFFD, since no reply could carry them.
"""

import json
import math
import re
from typing import Any, NoReturn

from fastapi import Request

from herdling.serve import errors

DEEPEST = 200
"""Lists and objects in each other; what is read must also be written without running out of stack."""
_TOO_DEEP = f"the body is nested more than {DEEPEST} deep"
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
        value = json.loads(raw, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise errors.bad_request(_TOO_DEEP) from None
    except ValueError as problem:  # of the syntax, the encoding, or the length of a number
        raise errors.bad_request(f"the body is not JSON: {problem}") from None
    if raw.count(b"[") + raw.count(b"{") > DEEPEST and _deeper(value, DEEPEST):
        raise errors.bad_request(_TOO_DEEP)
    if _HALVES.search(raw):
        text = json.dumps(value, ensure_ascii=False)
        value = json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return value


def _deeper(value: Any, most: int) -> bool:
    """Whether lists and objects stand in each other more than `most` deep; without recursion."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(number: str) -> float:
    value = float(number)
    return value if math.isfinite(value) else _refuse(number[:40])
