"""The application: every API and the page on one service.

app = create(service)           # an ASGI application; `herdling.serve.server.run` serves it
"""

import mimetypes
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import herdling
from herdling.errors import Error
from herdling.serve import about, errors, openai_chat, openai_completions
from herdling.serve.dialects import ROUTERS
from herdling.serve.gate import Gate

if TYPE_CHECKING:
    from herdling.serve.service import Service

PAGE = Path(__file__).with_name("page")
# The page asks nobody but this server, and nothing in a reply can make it do so. Pictures that the
# user adds are shown from memory.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; manifest-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


class ErrorFields(BaseModel):
    """OpenAI's error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of an answer that is an error; some APIs have a shape of their own."""

    error: ErrorFields


def create(service: "Service") -> FastAPI:
    """All routes over `service`, which may still be loading."""
    said: dict[int | str, dict[str, Any]] = {
        "4XX": {"model": ErrorBody, "description": "The call cannot be answered as it is."},
        "5XX": {"model": ErrorBody, "description": "The server cannot answer now."},
    }
    app = FastAPI(
        title="Herdling",
        version=herdling.__version__,
        docs_url=None,  # FastAPI's pages load their scripts from elsewhere
        redoc_url=None,
        responses=said,
        redirect_slashes=False,
    )
    for routes in (about.routes, openai_chat.routes, openai_completions.routes, *ROUTERS):
        app.include_router(routes(service))
    _serve_page(app, service)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Error, _refused)
    app.add_middleware(Gate, service=service)
    if service.settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )
    return app


# ---- errors


async def _invalid(request: Request, problem: Exception) -> Response:
    """A body that does not fit its model, as a 400 with the field's name."""
    assert isinstance(problem, RequestValidationError)
    first = problem.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        reason = f"The body is not valid JSON: {first['ctx']['error']}"
        return errors.response(request.url.path, errors.bad_request(reason))
    kind = request.headers.get("content-type", "")
    if not place and "json" not in kind.lower():
        reason = f"The body must be JSON with Content-Type: application/json, not {kind[:80]!r}"
        return errors.response(request.url.path, errors.bad_request(reason))
    param = place[0] if place else None
    name = ".".join(place)[:200] or "the body"
    return errors.response(request.url.path, errors.bad_request(f"{name}: {first['msg']}", param))


async def _http(request: Request, problem: Exception) -> Response:
    """Unknown routes, wrong methods, and every ApiError."""
    assert isinstance(problem, HTTPException)
    if isinstance(problem, errors.ApiError):
        return errors.response(request.url.path, problem)
    where = f"{request.method} {request.url.path[:200]}"
    words = {404: f"There is no {where} here", 405: f"{where} is not possible; see Allow"}
    error = errors.ApiError(
        problem.status_code,
        words.get(problem.status_code, str(problem.detail)),
        code={404: "unknown_url", 405: "method_not_allowed"}.get(problem.status_code),
        headers=problem.headers,
    )
    return errors.response(request.url.path, error)


async def _refused(request: Request, problem: Exception) -> JSONResponse:
    """A herdling.Error: mostly something that the client can mend."""
    return errors.response(request.url.path, errors.of(problem))


# ---- the page


def _serve_page(app: FastAPI, service: "Service") -> None:
    """Serve the files of `page/`, read once, at `/`."""
    if not (PAGE / "index.html").is_file():
        return
    for path in sorted(PAGE.rglob("*")):
        if path.is_file() and not path.name.startswith((".", "_")) and path.suffix != ".py":
            name = path.relative_to(PAGE).as_posix()
            route = "/" if name == "index.html" else f"/{name}"
            app.add_api_route(route, _file(path), methods=["GET", "HEAD"], include_in_schema=False)
            service.open_paths.add(route)


def _file(path: Path) -> Any:
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    headers = {
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    async def send() -> Response:
        return Response(path.read_bytes(), media_type=kind, headers=headers)

    return send
