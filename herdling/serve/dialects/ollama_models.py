"""What Ollama's clients ask about models: `/api/tags`, `/api/ps`, `/api/show`, `/api/version`.

Names are listed with the tag `:latest`, which Ollama adds to names without one, and are understood with
and without it. The digest is that of the config, not of the weights: it tells models apart.
"""

import hashlib
import json
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from herdling.serve.dialects import bodies, documented, ollama_in
from herdling.serve.service import Service

if TYPE_CHECKING:
    from herdling.infer.lm import LM

_NEVER = "2318-01-01T00:00:00Z"


def add_routes(router: APIRouter, service: Service) -> None:
    """Put the endpoints into `router`."""

    @router.get("/api/version")
    async def tell_version() -> Response:
        return JSONResponse({"version": version("herdling")})

    @router.get("/api/tags")
    async def tags() -> Response:
        return JSONResponse({"models": _entries(service)})

    @router.get("/api/ps")
    async def running() -> Response:
        size = _size(service.need()[0])
        on_gpu = service.need()[0].device.type != "cpu"
        more = {
            "expires_at": _NEVER,
            "size_vram": size if on_gpu else 0,
            "context_length": service.context,
        }
        return JSONResponse({"models": [{**entry, **more} for entry in _entries(service)]})

    @router.post("/api/show", openapi_extra=documented.body({"model": "string"}, ["model"]))
    async def show(request: Request) -> Response:
        service.adapter(ollama_in.model_name(await bodies.read(request)))
        return JSONResponse(describe(service))


def describe(service: Service) -> dict[str, Any]:
    """The reply of /api/show."""
    from herdling.inputs import chat

    lm, _ = service.need()
    text = lm.config.text
    capabilities = ["completion", "tools", "embedding"]
    return {
        "modelfile": f"FROM {service.settings.name}\n",
        "parameters": "",
        "template": chat.template(),
        "details": _details(lm),
        "model_info": {
            "general.architecture": "llama4",
            "general.parameter_count": _parameters(lm),
            "llama4.context_length": service.context,
            "llama4.block_count": text.num_hidden_layers,
            "llama4.embedding_length": text.hidden_size,
            "llama4.attention.head_count": text.num_attention_heads,
            "llama4.attention.head_count_kv": text.num_key_value_heads,
            "llama4.expert_count": text.num_local_experts,
            "llama4.expert_used_count": text.num_experts_per_tok,
            "llama4.vocab_size": text.vocab_size,
        },
        "capabilities": capabilities + (["vision"] if lm.config.vision else []),
        "modified_at": _time(service),
    }


def _entries(service: Service) -> list[dict[str, Any]]:
    lm, _ = service.need()
    common = {"modified_at": _time(service), "size": _size(lm), "details": _details(lm)}
    names = [f"{name}:latest" for name in service.names]
    return [{"name": n, "model": n, "digest": _digest(lm, n), **common} for n in names]


def _details(lm: "LM") -> dict[str, Any]:
    from herdling.quant.swap import main_format  # with torch, which is there by now

    count = _parameters(lm)
    unit, letter = (1e9, "B") if count >= 1e9 else (1e6, "M")
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": "llama4",
        "families": ["llama4"],
        "parameter_size": f"{count / unit:.1f}{letter}",
        "quantization_level": main_format(lm.model),
    }


def _parameters(lm: "LM") -> int:
    from herdling.quant.swap import size_of  # with torch, which is there by now

    return size_of(lm.model)[0]


def _size(lm: "LM") -> int:
    """Bytes in memory."""
    from herdling.quant.swap import size_of

    return size_of(lm.model)[1]


def _digest(lm: "LM", name: str) -> str:
    config = json.dumps([name, asdict(lm.config)], sort_keys=True, default=str)
    return hashlib.sha256(config.encode()).hexdigest()


def _time(service: Service) -> str:
    """When this server was started."""
    return datetime.fromtimestamp(service.settings.created, UTC).isoformat().replace("+00:00", "Z")
