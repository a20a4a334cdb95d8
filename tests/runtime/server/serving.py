"""A server in this process, on a real socket, so that tests can look at the engine behind it."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import uvicorn

from latentrt.runtime.api import Engine
from latentrt.runtime.server import process
from latentrt.runtime.server.app import Server, Settings, create_app

DEADLINE = 60  # seconds: only a defect takes so long


@dataclass
class Live:
    """A running server, and a client for it."""

    url: str
    server: Server
    uvicorn: uvicorn.Server
    client: httpx.Client

    @property
    def engine(self) -> Engine:
        return self.server.engine

    def post(self, path: str, **body) -> httpx.Response:
        return self.client.post(path, json=body)

    def complete(self, prompt, **body) -> dict:
        """A completion that must succeed."""
        response = self.post("/v1/completions", prompt=prompt, **body)
        assert response.status_code == 200, response.text
        return response.json()

    def chat(self, messages, **body) -> dict:
        """A chat completion that must succeed; a text is a user's message."""
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        response = self.post("/v1/chat/completions", messages=messages, **body)
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, path: str, **body) -> list[dict]:
        """The events of a stream, which must end with [DONE]."""
        with self.client.stream("POST", path, json=body | {"stream": True}) as response:
            assert response.status_code == 200, response.read()
            return events("".join(response.iter_text()))

    def all_free(self) -> bool:
        """Whether no page belongs to anybody."""
        scheduler = self.engine.loop.schedulers.ranks[0]
        return not scheduler.running and not scheduler.waiting and scheduler.cache.free_tokens == scheduler.cache.capacity


def events(text: str) -> list[dict]:
    """Parsed server-sent events; [DONE] must be the last, and is left out."""
    parts = text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""], text[-200:]
    return [json.loads(part[part.index("data: ") + 6 :]) for part in parts[:-2]]  # before it may stand the event's kind


def until(true: Callable[[], bool]) -> None:
    """Waits until something is true; that it never is, is a failure."""
    end = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < end, "it never came true"
        threading.Event().wait(0.005)


@contextmanager
def serving(engine: Engine, **settings) -> Iterator[Live]:
    """A server of an engine, which it closes at the end."""
    listening = process.listen("127.0.0.1", 0)
    app = create_app(engine, Settings("model", version="1.2.3", **settings))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, lifespan="on"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=DEADLINE) as client:
            until(lambda: server.started)
            yield Live(url, app.state.server, server, client)
    finally:
        server.should_exit = True
        thread.join()
