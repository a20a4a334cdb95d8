"""Pure ASGI middleware: it costs nothing per streamed token, unlike functions that wrap responses."""

import hmac
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentrt.runtime.server.errors import ApiError

MAX_BODY = 32 << 20  # bytes
OPEN_PATHS = {"/", "/health", "/ping", "/version", "/metrics", "/openapi.json", "/docs"}


class RequestId:
    """Every answer has an x-request-id: the client's own, or a new one."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if 0 < len(given) <= 128 and given.isascii() and given.isprintable() else uuid.uuid4().hex

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        await self.app(scope, receive, named)


class ApiKey:
    """Refuses requests without one of the keys as bearer token; some paths are open to all."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self.app, self._keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS" or self._allowed(scope):
            return await self.app(scope, receive, send)
        refusal = ApiError(401, "no valid API key; give it as Authorization: Bearer KEY", code="invalid_api_key")
        refusal.headers["www-authenticate"] = "Bearer"
        await refusal.response()(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1", "replace")
        return kind.lower() == "bearer" and any([hmac.compare_digest(given, known) for known in self._keys])


class BodyLimit:
    """Refuses bodies of more than `size` bytes with 413, before they are in memory."""

    def __init__(self, app: ASGIApp, size: int = MAX_BODY):
        self.app, self.size = app, size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refusal = ApiError(413, f"the body is larger than {self.size} bytes (accepted); send less text", code="body_too_large")
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > self.size:
            return await refusal.response()(scope, receive, send)
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.size:
                raise HTTPException(413, str(refusal))  # FastAPI lets nothing else through
            return message

        await self.app(scope, counted, send)
