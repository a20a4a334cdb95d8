"""Answers on their way to a client, who may vanish at any time: then the engine's pages are free after the running step."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from latentrt.runtime.server.errors import ApiError, api_error

DONE = b"data: [DONE]\n\n"
Result = TypeVar("Result")


def sse(content: dict) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


async def unless_gone(receive: Receive, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled as soon as the client is gone; then ClientGoneError."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events as `chunks` gives them, then [DONE]. An error becomes an event: no stream ends without saying so.

    `ended` is called at the end, whatever that is.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[bytes], ended: Callable[[], None], headers: dict[str, str] = {}):
        self.status_code, self.background = 200, None
        self._chunks, self._ended = chunks, ended
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"} | headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await unless_gone(receive, self._write(send))
        except (ClientGoneError, OSError):
            pass
        finally:
            self._ended()

    async def _write(self, send: Send) -> None:
        try:
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except OSError:
            raise
        except Exception as error:
            told = sse(api_error(error).content)
            if not isinstance(error, ApiError):
                _report(error)
            await send({"type": "http.response.body", "body": told, "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})


def _report(error: Exception) -> None:
    """Into the log, if it is no error that is told by name."""
    import logging

    if api_error(error).status == 500:
        logging.getLogger("uvicorn.error").error("a stream failed", exc_info=error)
