"""The small routes that say what this server is and how it does: models, health, version, metrics."""

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

import herdling
from herdling.serve import errors
from herdling.serve.status import status

if TYPE_CHECKING:
    from herdling.serve.service import Service


def routes(service: "Service") -> APIRouter:
    """The routes, answering from `service`."""
    router = APIRouter()

    @router.get("/health", tags=["server"])
    @router.get("/v1/health", tags=["server"], include_in_schema=False)
    async def health() -> Any:
        """200 when calls are answered; 503 with the reason otherwise."""
        state, reason = service.state()
        if state == "ok":
            return {"status": "ok"}
        return JSONResponse({"status": state, "reason": reason}, 503, {"Retry-After": "5"})

    @router.get("/v1/models", tags=["OpenAI"])
    async def models() -> Any:
        """The model, its other names, and its adapters."""
        return {"object": "list", "data": [_model(service, name) for name in service.names]}

    @router.get("/v1/models/{id:path}", tags=["OpenAI"])
    async def model(id: str) -> Any:
        """One of them."""
        if id not in service.names:
            raise errors.no_model(id)
        return _model(service, id)

    @router.get("/version", tags=["server"])
    async def version() -> Any:
        """Herdling's version."""
        return {"version": herdling.__version__}

    @router.get("/metrics", tags=["server"], response_class=Response)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/herdling/status", tags=["server"])
    async def herdling_status() -> Any:
        """What the page shows: model, engine, memory, queue, rates, expert load."""
        return status(service)

    return router


def _model(service: "Service", name: str) -> dict[str, Any]:
    fields = {"id": name, "object": "model", "created": service.settings.created}
    fields["owned_by"] = "herdling"
    if service.lm is not None:
        fields["max_model_len"] = service.lm.config.text.max_position_embeddings
    if name in service.settings.adapters:
        fields["parent"] = service.settings.name
    return fields
