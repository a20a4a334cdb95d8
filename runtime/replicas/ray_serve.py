"""Replicas of the server on Ray Serve: a front that takes HTTP, and a process for every replica of the engine.

`latentrt serve BUNDLE --replicas 2`; on a cluster `serve run latentrt.runtime.replicas.ray_serve:app bundle=BUNDLE replicas=2`.
Ray starts and replaces replicas, and adds some while many requests wait. The front answers for replicas that die: relay.py.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from latentrt.runtime.api import load
from latentrt.runtime.replicas import relay
from latentrt.runtime.replicas.affinity import Affinity, blocks
from latentrt.runtime.server.app import Settings, create_app
from latentrt.runtime.server.middleware import BodyLimit

HEALTH_SECONDS = 2.0  # between questions whether a replica lives
WAITING = 4  # requests a replica, running or waiting, that Ray adds another replica for


@dataclass(frozen=True)
class Copies:
    """How many replicas there are, and what each takes. max_replicas: more than `replicas` lets Ray add some under load."""

    replicas: int = 1
    max_replicas: int = 0
    cpus: float = 1.0
    gpus: float = 0.0
    requests: int = 256  # that one replica takes at once, waiting ones included


@dataclass(frozen=True)
class Loading:
    """What a replica loads: arguments of latentrt.load."""

    bundle: str
    options: dict = field(default_factory=dict)


class Replica:
    """One process with an engine and the whole server behind `ask`."""

    def __init__(self, loading: Loading, settings: Settings):
        self._app = create_app(load(loading.bundle, **loading.options), settings)
        self._life = self._app.router.lifespan_context(self._app)
        self._starting = asyncio.Lock()
        self._started = False

    async def ask(self, scope: dict, body: bytes, names: list[bytes]) -> AsyncGenerator[dict, None]:
        """ASGI messages that answer a request; `names` are for the router."""
        await self._start()
        async for message in relay.respond(self._app, scope, body):
            yield message

    async def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        await self._start()
        if not self._app.state.server.service.alive:
            raise RuntimeError(str(self._app.state.server.engine.loop.lost or "the engine is gone"))

    async def _start(self) -> None:
        async with self._starting:
            if not self._started:
                await self._life.__aenter__()
                self._started = True


class PrefixRouter(RequestRouter):
    """Sends requests that begin alike to the same replica, as long as it is not much busier than others."""

    def initialize_state(self, **kwargs) -> None:
        self._affinity = Affinity()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        names = _names(pending_request)
        best = self._affinity.best(names, {replica.replica_id for replica in candidate_replicas}) if names else None
        first = [replica for replica in candidate_replicas if replica.replica_id == best]
        rest = [replica for replica in candidate_replicas if replica.replica_id != best]
        return [first, rest] if first else [rest]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result) -> None:
        super().on_request_routed(pending_request, replica_id, result)
        self._affinity.sent(_names(pending_request), replica_id)

    def on_request_completed(self, replica_id: ReplicaID, *details) -> None:
        super().on_request_completed(replica_id, *details)
        self._affinity.ended(replica_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._affinity.died(replica_id)


def _names(pending_request: PendingRequest | None) -> list[bytes]:
    given = pending_request.args if pending_request else ()
    return given[2] if len(given) > 2 and isinstance(given[2], list) else []


class FrontEnd:
    """Takes HTTP, and has a replica answer."""

    def __init__(self, replica, max_body: int):
        self._replica, self._max_body = replica.options(stream=True), max_body

    def __serve_build_asgi_app__(self):
        return BodyLimit(relay.Front(self._ask), self._max_body)

    async def _ask(self, scope: dict, body: bytes) -> AsyncGenerator[dict, None]:
        try:
            async for message in self._replica.ask.remote(scope, body, blocks(body)):
                yield message
        except TaskCancelledError:
            raise
        except RayActorError as error:
            raise relay.ReplicaGoneError(type(error).__name__) from None
        except RayError as error:
            raise relay.ReplicaGoneError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from None


def application(loading: Loading, settings: Settings, copies: Copies = Copies()) -> serve.Application:
    """The application; `serve.run` it. Every replica loads the bundle, whose weights a machine's replicas share in memory."""
    many = copies.max_replicas > copies.replicas
    scaling = {"autoscaling_config": AutoscalingConfig(
        min_replicas=copies.replicas, max_replicas=copies.max_replicas, target_ongoing_requests=WAITING,
    )} if many else {"num_replicas": copies.replicas}  # fmt: skip
    replica = serve.deployment(
        Replica, name="replica", max_ongoing_requests=copies.requests, health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=30.0, graceful_shutdown_timeout_s=settings.drain_seconds,
        ray_actor_options={"num_cpus": copies.cpus, "num_gpus": copies.gpus},
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter), **scaling,
    )  # fmt: skip
    front = serve.deployment(
        serve.ingress()(FrontEnd), name="front", max_ongoing_requests=1 << 16, ray_actor_options={"num_cpus": 0}
    )
    return front.bind(replica.bind(loading, settings), settings.max_body)


def app(arguments: dict[str, str]) -> serve.Application:
    """For `serve run`: bundle, and as wanted model, replicas, max_replicas, cpus, gpus, target, backend, device, threads,
    cache_tokens, drafts, batch_invariant (true)."""
    given = dict(arguments)
    bundle = str(Path(given.pop("bundle")).absolute())
    settings = Settings(given.pop("model", Path(bundle).name))
    numbers = {name: type(getattr(Copies, name))(given.pop(name)) for name in Copies.__dataclass_fields__ if name in given}
    kinds = {"threads": int, "cache_tokens": int, "drafts": int, "batch_invariant": lambda value: value.lower() == "true"}
    options = {name: kinds.get(name, str)(value) for name, value in given.items()}
    return application(Loading(bundle, options), settings, Copies(**numbers))


def run(loading: Loading, settings: Settings, copies: Copies, host: str, port: int) -> int:
    """Serves until a signal comes, on the cluster that RAY_ADDRESS names or on this machine alone."""
    ray.init(address=None, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        serve.start(http_options={"host": host, "port": port, "location": "HeadOnly"})
        serve.run(application(loading, settings, copies), name="latentrt", blocking=False)
        print(f"serving {settings.model} at http://{host}:{port}/v1, {copies.replicas} replicas on Ray Serve", flush=True)
        _until_a_signal()
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


def _until_a_signal() -> None:
    import signal
    import threading

    told = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told.set())
    told.wait()
