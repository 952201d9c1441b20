"""Errors as clients expect them: a status, and a body in the shape of the API that was called.

    raise errors.bad_request("temperature is -1; it must be at least 0", "temperature")

OpenAI's shape is the default: `{"error": {"message", "type", "param", "code"}}`. An API with another
shape says so once, for all of its paths: `errors.register("/v1/messages", shape)`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from herdling.errors import ConfigError, DataError, Error, InputError, MissingExtra

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(HTTPException):
    """What a client is told: status, one line, and what it can act on.

    An HTTPException, so that FastAPI lets it pass wherever it is raised.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        other = "invalid_request_error" if status < 500 else "server_error"
        self.message, self.param, self.code = message, param, code
        self.type = type or _TYPES.get(status, other)

    @property
    def status(self) -> int:
        return self.status_code


Shape = Callable[[ApiError], Any]


def openai(error: ApiError) -> dict[str, Any]:
    """The body of an error in OpenAI's APIs."""
    fields = {"message": error.message, "type": error.type, "param": error.param}
    return {"error": {**fields, "code": error.code}}


_shapes: dict[str, Shape] = {}


def register(prefix: str, shape: Shape) -> None:
    """Give all errors on paths that begin with `prefix` the body `shape(error)`."""
    _shapes[prefix] = shape


def body(path: str, error: ApiError) -> Any:
    """The JSON body of `error` for a call of `path`."""
    fitting = [prefix for prefix in _shapes if path.startswith(prefix)]
    return _shapes[max(fitting, key=len)](error) if fitting else openai(error)


def response(path: str, error: ApiError) -> JSONResponse:
    """The whole answer."""
    return JSONResponse(body(path, error), error.status, error.headers)


# ---- the errors that several places raise


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def too_long(tokens: int, longest: int, param: str = "messages") -> ApiError:
    """A prompt that leaves no room for a reply; the message has both numbers."""
    return bad_request(
        f"This model's maximum context length is {longest} tokens, of which a reply needs at least "
        f"one, but the prompt has {tokens} tokens; shorten it",
        param,
        "context_length_exceeded",
    )


def no_model(name: object) -> ApiError:
    return ApiError(
        404,
        f"The model {str(name)[:100]!r} does not exist here; GET /v1/models lists those that do",
        param="model",
        code="model_not_found",
    )


def no_key() -> ApiError:
    return ApiError(
        401,
        "No valid API key; send one as 'Authorization: Bearer KEY'",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def too_large(message: str, param: str | None = None) -> ApiError:
    # The rest of the body is not read, so the connection cannot go on.
    return ApiError(
        413, message, param=param, code="request_too_large", headers={"Connection": "close"}
    )


def busy(message: str, seconds: int) -> ApiError:
    return ApiError(429, message, code="queue_full", headers={"Retry-After": str(max(1, seconds))})


def unavailable(message: str, code: str, seconds: int = 5) -> ApiError:
    return ApiError(
        503,
        message,
        type="unavailable_error",
        code=code,
        headers={"Retry-After": str(seconds)},
    )


def loading() -> ApiError:
    return unavailable("The model is still loading; try again soon", "loading")


def of(problem: BaseException, param: str | None = None) -> ApiError:
    """Any exception as an ApiError: what users can mend is a 400, all else a 500."""
    if isinstance(problem, ApiError):
        return problem
    if isinstance(problem, InputError | ConfigError | DataError):
        return bad_request(str(problem), param)
    if isinstance(problem, MissingExtra):
        return ApiError(501, str(problem), param=param, code="not_installed")
    if isinstance(problem, Error):
        return ApiError(500, str(problem), code="engine_error")
    # What else went wrong is for the log; it may tell more than a client should know.
    return ApiError(500, "Something went wrong inside the server; its log says what")
