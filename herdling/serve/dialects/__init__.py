"""The APIs of others over the same service: each file speaks one, `ROUTERS` are all of them.

    for routes in ROUTERS:
        app.include_router(routes(service))

`*_in` reads a body into the service's own terms, `*_out` writes replies in the API's; neither knows of
HTTP, which the file without a suffix does.
"""

from herdling.serve.dialects import (
    embeddings,
    invocations,
    messages,
    ollama,
    responses,
    tgi,
    tokens,
)

ROUTERS = (
    responses.routes,
    messages.routes,
    embeddings.routes,
    tokens.routes,
    ollama.routes,
    tgi.routes,
    invocations.routes,
)
"""Each makes a fastapi.APIRouter for a Service."""
