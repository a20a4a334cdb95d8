"""The application: endpoints, and the life of the engine behind them."""

import importlib.resources
import time
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.middleware.cors import CORSMiddleware

from latentrt.runtime.api import Engine
from latentrt.runtime.server import errors, middleware, texts
from latentrt.runtime.server.chat import Chat
from latentrt.runtime.server.completions import Completion
from latentrt.runtime.server.errors import ApiError
from latentrt.runtime.server.metrics import Metrics
from latentrt.runtime.server.protocol import (
    Body,
    ChatRequest,
    ChatResponse,
    CompletionRequest,
    CompletionResponse,
    DetokenizeRequest,
    DetokenizeResponse,
    ErrorResponse,
    ModelCard,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
)  # fmt: skip
from latentrt.runtime.server.responses import Responses
from latentrt.runtime.server.responses_protocol import ResponsesRequest, ResponsesResponse
from latentrt.runtime.server.streaming import ClientGoneError, EventStream, unless_gone
from latentrt.runtime.service import EngineService

REFUSALS = {
    status: {"model": ErrorResponse, "description": words}
    for status, words in {
        400: "The request is not accepted.", 401: "No valid API key.", 404: "No such model.", 413: "The body is too large.",
        429: "Too many requests wait.", 500: "The answer failed.", 503: "The engine is gone, or shuts down.",
    }.items()
}  # fmt: skip
GONE = 499  # what nginx logs where the client did not wait


@dataclass(frozen=True)
class Settings:
    """How a server behaves. max_waiting: answers that may wait before more are refused with 429; max_body: bytes.

    model: the name that it serves under; api_keys: without one everybody may ask; origins: sites whose pages may ask.
    """

    model: str
    api_keys: Sequence[str] = ()
    origins: Sequence[str] = ()
    max_waiting: int = 256
    max_body: int = middleware.MAX_BODY
    drain_seconds: float = 30.0
    version: str = "0"


class Server:
    """What the endpoints share."""

    def __init__(self, engine: Engine, settings: Settings):
        self.settings, self.created = settings, int(time.time())
        self.engine, self.service = engine, EngineService(engine, settings.max_waiting)
        self.metrics = Metrics(self.service, settings.model)

    def check_model(self, name: str | None) -> None:
        """ApiError for a model that is not served."""
        if name is not None and name != self.settings.model:
            words = f"the model {name!r} is not here, accepted: {self.settings.model!r}"
            raise ApiError(404, words, "model", "model_not_found")

    def card(self) -> ModelCard:
        path = str(self.engine.bundle.path)
        return ModelCard(id=self.settings.model, created=self.created, root=path, max_model_len=self.engine.limits.max_context)

    async def answer(self, kind: Callable, body, request: Request) -> Response:
        """The answer to a completion or chat request, whole or as a stream."""
        self.check_model(body.model)
        asked = await kind.of(self.service, self.settings.model, body)
        running, headers = asked.answers.request, _ignored(body)

        def ended() -> None:
            running.abort()
            self.metrics.forget(running)

        if body.stream:
            return EventStream(asked.stream(), ended, headers)
        try:
            return JSONResponse(await unless_gone(request.receive, asked.respond()), headers=headers)
        except ClientGoneError:
            return Response(status_code=GONE)
        finally:
            ended()


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """An ASGI application that owns the engine, and closes it when it ends."""
    server = Server(engine, settings)

    @asynccontextmanager
    async def life(app: FastAPI):
        await server.service.start()
        yield
        await server.service.drain(settings.drain_seconds)
        await server.service.stop()

    app = FastAPI(title="latentrt", version=settings.version, lifespan=life, redoc_url=None)
    app.state.server = server
    errors.install(app)
    _add_answers(app, server)
    _add_texts(app, server)
    _add_state(app, server, settings)
    app.add_middleware(middleware.BodyLimit, size=settings.max_body)
    if settings.api_keys:
        app.add_middleware(middleware.ApiKey, keys=settings.api_keys)
    if settings.origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(middleware.RequestId)
    return app


def _add_answers(app: FastAPI, server: Server) -> None:
    stream = {200: {"content": {"text/event-stream": {}}}}

    @app.post("/v1/chat/completions", response_model=ChatResponse, responses=REFUSALS | stream)
    async def chat(body: ChatRequest, request: Request):
        """An answer in a conversation."""
        return await server.answer(Chat, body, request)

    @app.post("/v1/completions", response_model=CompletionResponse, responses=REFUSALS | stream)
    @app.post("/beta/completions", include_in_schema=False)  # DeepSeek's address of the same
    async def completions(body: CompletionRequest, request: Request):
        """Text that goes on."""
        return await server.answer(Completion, body, request)

    @app.post("/v1/responses", response_model=ResponsesResponse, responses=REFUSALS | stream)
    async def responses(body: ResponsesRequest, request: Request):
        """An answer in a conversation, in OpenAI's newer form."""
        return await server.answer(Responses, body, request)

    @app.get("/v1/models", response_model=ModelList)
    async def models():
        """The one model."""
        return ModelList(data=[server.card()])

    @app.get("/v1/models/{name:path}", response_model=ModelCard, responses={404: REFUSALS[404]})
    async def model(name: str):
        """The model by its name."""
        server.check_model(name)
        return server.card()


def _add_texts(app: FastAPI, server: Server) -> None:
    @app.post("/tokenize", response_model=TokenizeResponse, responses=REFUSALS)
    async def tokenize(body: TokenizeRequest):
        """Token ids of a text or of a conversation."""
        server.check_model(body.model)
        return await texts.tokenize(server.engine, body)

    @app.post("/detokenize", response_model=DetokenizeResponse, responses=REFUSALS)
    async def detokenize(body: DetokenizeRequest):
        """The text of token ids."""
        server.check_model(body.model)
        return texts.detokenize(server.engine, body)

    @app.get("/tokenizer_info", responses={400: REFUSALS[400]})
    async def tokenizer_info() -> dict:
        """The chat template and the special tokens."""
        return texts.info(server.engine)


def _add_state(app: FastAPI, server: Server, settings: Settings) -> None:
    page = (importlib.resources.files(__package__) / "page.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def chat_page():
        return HTMLResponse(page, headers={"content-security-policy": texts.PAGE_POLICY})

    @app.get("/health", responses={503: REFUSALS[503]})
    @app.get("/ping", include_in_schema=False)
    async def health() -> dict:
        """Whether a request could be answered."""
        if server.service.closing or not server.service.alive:
            raise ApiError(503, "shutting down" if server.service.closing else "the engine is gone; start the server again")
        return {"status": "ok"}

    @app.get("/version")
    async def version() -> dict:
        """The version of latentrt."""
        return {"version": settings.version}

    @app.api_route("/metrics", methods=["GET", "HEAD"], include_in_schema=False)
    async def metrics():
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")


def _ignored(body: Body) -> dict[str, str]:
    """A header that names the fields that meant nothing."""
    names = [name for name in body.ignored if name.isascii() and name.isprintable()][:32]
    return {"x-ignored-fields": ", ".join(names)} if names else {}
