"""What the OpenAPI document says of endpoints whose bodies are not read by FastAPI.

@router.post("/v1/messages", openapi_extra=body({"messages": "array", "stream": "boolean"}))
APIRouter(responses=failures({"error": "string"}))
"""

from collections.abc import Collection, Mapping
from typing import Any

Schema = dict[str, Any]


def body(fields: Mapping[str, Schema | str], required: Collection[str] = ()) -> dict[str, Any]:
    """The request body of an endpoint: its main fields, a type each; others are read past."""
    return _content("requestBody", _object(fields, required))


def failures(fields: Mapping[str, Schema | str]) -> dict[int | str, dict[str, Any]]:
    """The body of every answer that is an error."""
    content = {"application/json": {"schema": _object(fields, fields)}}
    return {
        "4XX": {"description": "The call cannot be answered as it is.", "content": content},
        "5XX": {"description": "The server cannot answer now.", "content": content},
    }


def _object(fields: Mapping[str, Schema | str], required: Collection[str]) -> Schema:
    known = {k: {"type": v} if isinstance(v, str) else v for k, v in fields.items()}
    more = {"required": list(required)} if required else {}
    return {"type": "object", "properties": known, **more}


def _content(key: str, schema: Schema) -> dict[str, Any]:
    return {key: {"required": True, "content": {"application/json": {"schema": schema}}}}
