"""One process that serves: uvicorn's event loop, and the engine's thread beside it."""

import asyncio
import gc
import os
import socket

import uvicorn

from latentrt.runtime.api import Engine
from latentrt.runtime.errors import RequestError
from latentrt.runtime.server.app import Settings, create_app

KEEP_ALIVE = 65  # seconds that an idle connection stays; balancers keep theirs for 60


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. RequestError if the address cannot be had: before a model is loaded."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return socket.create_server(found[0][4][:2], family=found[0][0], backlog=2048)
    except OSError as error:
        raise RequestError(f"--host {host} --port {port}: {error.strerror or error}; give another one") from None


def run(engine: Engine, settings: Settings, listening: socket.socket) -> int:
    """Serves until a signal comes; a second one ends all at once. Returns the exit status."""
    app = create_app(engine, settings)
    config = uvicorn.Config(
        app, log_level="info", access_log=False, timeout_keep_alive=KEEP_ALIVE, server_header=False, lifespan="on",
        timeout_graceful_shutdown=max(1, round(2 * settings.drain_seconds)) + 1,
    )  # fmt: skip
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {settings.model} at http://{shown}:{port}/v1 (a page to chat: http://{shown}:{port}/)", flush=True)
    gc.collect()
    gc.freeze()  # else a full collection would look at all that was imported, and hold everything up
    _Server(config).run([listening])
    return 0


class _Server(uvicorn.Server):
    """Drains the engine on the first signal: requests that run end, new ones are refused, streams that take too long are
    told so."""

    def handle_exit(self, sig: int, frame) -> None:
        if self.should_exit:
            os._exit(130)  # the engine's thread may be in the middle of a long step
        self.should_exit = True  # and nothing more: uvicorn's own would raise the signal again in the end
        server = self.config.app.state.server
        self._drain = asyncio.get_event_loop().create_task(server.service.drain(server.settings.drain_seconds))
