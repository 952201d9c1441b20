"""What the OpenAPI document says of endpoints whose bodies are not read by FastAPI.

@router.post("/v1/messages", openapi_extra=body({"messages": "array", "stream": "boolean"}))
APIRouter(responses=failures({"error": "string"}))
"""

from collections.abc import Collection, Mapping
from typing import Any

Schema = dict[str, Any]


def body(
    fields: Mapping[str, Schema | str], required: Collection[str] = (), stream: str | None = None
) -> dict[str, Any]:
    """The request body of an endpoint: its main fields, a type each; others are read past, and what is
    not required may be null. `stream` is the media type of replies that come in pieces."""
    known: Schema = {
        name: {"type": kind if name in required else [kind, "null"]}
        if isinstance(kind, str)
        else kind
        for name, kind in fields.items()
    }
    schema = {"type": "object", "properties": known, "required": list(required)}
    content = {"application/json": {"schema": schema}}
    said: dict[str, Any] = {"requestBody": {"required": True, "content": content}}
    if stream is not None:
        said["responses"] = {"200": {"content": {stream: {}}}}
    return said


def failures(fields: Mapping[str, Schema | str]) -> dict[int | str, dict[str, Any]]:
    """The body of every answer that is an error."""
    known = {k: {"type": v} if isinstance(v, str) else v for k, v in fields.items()}
    schema = {"type": "object", "properties": known, "required": list(fields)}
    content = {"application/json": {"schema": schema}}
    return {
        "4XX": {"description": "The call cannot be answered as it is.", "content": content},
        "5XX": {"description": "The server cannot answer now.", "content": content},
    }
