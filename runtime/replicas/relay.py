"""HTTP requests handed from one process to another as ASGI messages: a front before replicas, and a replica's end of it.

No stream ends without a word. A replica that dies before anything was sent is asked again elsewhere; one that dies within a
stream leaves an error event and [DONE]; where all fail, the answer is 503 with Retry-After.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

from starlette.exceptions import HTTPException

ATTEMPTS = 3
RETRY_SECONDS = 2  # what a client is told to wait: a replica takes longer to come back, others are there at once
_LOCAL = {"app", "asgi", "state", "extensions", "router", "endpoint", "path_params", "fastapi_astack"}  # of one process
Message = dict
Ask = Callable[[dict, bytes], AsyncGenerator[Message, None]]


class ReplicaGoneError(RuntimeError):
    """The replica that was to answer is gone."""


def portable(scope: dict) -> dict:
    """The part of a scope that another process understands."""
    return {name: value for name, value in scope.items() if name not in _LOCAL}


async def respond(app, scope: dict, body: bytes) -> AsyncGenerator[Message, None]:
    """What an ASGI app sends for a request whose whole body is here. Closing it tells the app that the client has gone."""
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    gone, given = asyncio.Event(), False

    async def receive() -> Message:
        nonlocal given
        if given:
            await gone.wait()
            return {"type": "http.disconnect"}
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    task = asyncio.create_task(app(scope | {"asgi": {"version": "3.0"}, "state": {}}, receive, messages.put))
    task.add_done_callback(lambda _: messages.put_nowait(None))
    try:
        while (message := await messages.get()) is not None:
            yield message
        await task
    finally:
        gone.set()
        await asyncio.wait([task])


class Front:
    """An ASGI app that has others answer: `ask` gives the messages of one of them, and raises ReplicaGoneError."""

    def __init__(self, ask: Ask):
        self._ask = ask

    async def __call__(self, scope: dict, receive, send) -> None:
        if scope["type"] != "http":
            return
        try:
            body = await _read(receive)
        except HTTPException as error:  # too large
            return await _send_whole(send, error.status_code, _error(str(error.detail), "invalid_request_error"))
        if body is None:
            return
        gone = None
        for _ in range(ATTEMPTS):
            try:
                return await self._relay(portable(scope), body, send)
            except ReplicaGoneError as error:
                gone = error
        await _send_whole(send, 503, _error(f"no replica could answer ({gone}); ask again"), retry_after=RETRY_SECONDS)

    async def _relay(self, scope: dict, body: bytes, send) -> None:
        """Passes an answer on. ReplicaGoneError only while nothing was sent."""
        async with aclosing(self._ask(scope, body)) as messages:
            start = await _first(messages)
            if not _is_stream(start):
                whole = [message async for message in messages]
                for message in (start, *whole):
                    await send(message)
                return
            await self._stream(start, messages, send)

    async def _stream(self, start: Message, messages: AsyncIterator[Message], send) -> None:
        first = await _first(messages)
        for message in (start, first):
            await send(message)
        try:
            async for message in messages:
                await send(message)
        except ReplicaGoneError as error:
            told = json.dumps(_error(f"the replica that answered is gone ({error}); ask again"))
            await send({"type": "http.response.body", "body": f"data: {told}\n\ndata: [DONE]\n\n".encode(), "more_body": False})


async def _first(messages: AsyncIterator[Message]) -> Message:
    async for message in messages:
        return message
    raise ReplicaGoneError("it sent nothing")


def _is_stream(start: Message) -> bool:
    return any(name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in start["headers"])


async def _read(receive) -> bytes | None:
    """The whole body; None if the client went away."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _error(words: str, kind: str = "server_error") -> dict:
    """In OpenAI's form."""
    code = "replica_gone" if kind == "server_error" else None
    return {"error": {"message": words, "type": kind, "param": None, "code": code}}


async def _send_whole(send, status: int, content: dict, retry_after: int | None = None) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"retry-after", str(retry_after).encode())] if retry_after else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
