"""Errors as OpenAI's API gives them: {"error": {"message", "type", "param", "code"}} with the status that clients expect."""

import re
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from latentrt.runtime.errors import BundleError, EngineError, EngineLostError, RequestError
from latentrt.runtime.service import BusyError, ClosingError

_TYPES = {401: "authentication_error", 404: "not_found_error", 413: "invalid_request_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error with its HTTP status. `param`: the field that is wrong; `code`: what programs look at."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, headers: dict | None = None
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    @property
    def content(self) -> dict:
        """The body."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.content, self.status, self.headers)


def api_error(error: Exception) -> ApiError:
    """What a client is told of any error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError | BundleError):
        too_long = "(max_context)" in str(error) or "the latent cache holds" in str(error)
        if too_long:  # litellm and langchain know it by these words
            return ApiError(400, f"the prompt is too long: {error}", code="context_length_exceeded")
        return ApiError(400, str(error))
    if isinstance(error, BusyError):
        return ApiError(429, str(error), code="rate_limit_exceeded", headers={"retry-after": str(error.retry_after)})
    if isinstance(error, ClosingError):
        return ApiError(503, str(error), headers={"retry-after": "5"})
    if isinstance(error, EngineLostError):
        return ApiError(503, str(error), code="engine_lost")
    if isinstance(error, EngineError):
        return ApiError(500, str(error))
    return ApiError(500, f"{type(error).__name__}: a defect of the server; its log has more")


def install(app: FastAPI) -> None:
    """Answers every error of an app in this form."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError):
        return _invalid(error, request.headers.get("content-type", "none")).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException):
        words = f"{request.method} {request.url.path}: {error.detail or HTTPStatus(error.status_code).phrase}"
        return ApiError(error.status_code, words, headers=dict(error.headers or {})).response()

    for kind in (ApiError, RequestError, BundleError, BusyError, ClosingError, EngineError):

        @app.exception_handler(kind)
        async def known(request: Request, error: Exception):
            return api_error(error).response()

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception):
        return api_error(error).response()


def _invalid(error: RequestValidationError, content_type: str) -> ApiError:
    """The first thing that is wrong with a body; unions report each branch, and the deepest knows best."""
    found = max(error.errors(), key=lambda e: len(e["loc"]))
    branches = re.compile(r"[\[(]|^(str|int|float|bool)$")  # pydantic names the branch of a union among the parts
    place = [str(part) for part in found["loc"] if part != "body" and not branches.search(str(part))]
    named = next((p for p in place), None)
    message = found["msg"]
    if found["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {found.get('ctx', {}).get('error', message)}")
    if not place and "json" not in content_type:
        return ApiError(400, f"content-type is {content_type!r}, accepted: application/json")
    return ApiError(400, f"{'.'.join(place) or 'the body'}: {message}", named)
