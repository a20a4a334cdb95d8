"""The command serve: OpenAI's API over a bundle."""

import os
from pathlib import Path
from typing import Annotated

import typer

from latentrt import __version__, interrupt
from latentrt.commands.options import BackendName, BundlePath, Device, Ranks, TargetName
from latentrt.commands.run import BatchInvariant, CacheTokens, Drafts, Threads
from latentrt.runtime.errors import RequestError

KEY_VARIABLE = "LATENTRT_API_KEY"
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")]
Names = Annotated[str | None, typer.Option("--served-model-name", help="What requests call it.", show_default="the folder's")]
Keys = Annotated[list[str] | None, typer.Option("--api-key", help=f"Ask for one of these (repeatable; or ${KEY_VARIABLE}).")]
Origins = Annotated[list[str] | None, typer.Option("--allow-origin", help="Sites whose pages may ask (repeatable; * for all).")]


def serve(
    bundle: BundlePath,
    host: Annotated[str, typer.Option(help="127.0.0.1: this machine only. 0.0.0.0: everybody who reaches it.")] = "127.0.0.1",
    port: Port = 8000,
    name: Names = None,
    api_key: Keys = None,
    allow_origin: Origins = None,
    max_waiting: Annotated[int, typer.Option(min=0, help="Answers that may wait; more are refused with 429.")] = 256,
    max_body: Annotated[int, typer.Option(min=1, help="Largest body of a request, in bytes.")] = 32 << 20,
    drain_seconds: Annotated[float, typer.Option(min=0, help="After SIGTERM, how long answers may take to end.")] = 30.0,
    replicas: Annotated[int, typer.Option(min=0, help="Processes with an engine each, on Ray Serve; 0: this one alone.")] = 0,
    max_replicas: Annotated[int, typer.Option(min=0, help="So many under load, with --replicas.")] = 0,
    target: TargetName = None, threads: Threads = 0, cache_tokens: CacheTokens = None, drafts: Drafts = 0,
    backend: BackendName = None, device: Device = "auto", ranks: Ranks = None, batch_invariant: BatchInvariant = False,
) -> int:  # fmt: skip
    """Serves OpenAI's API, and a page to chat at /. Ctrl-C or SIGTERM lets answers end, and leaves."""
    with interrupt.leaves_at_once():
        try:
            from latentrt.runtime.server import process
        except ImportError as error:
            raise RequestError(f'{error.name} is not installed; pip install "latentrt[server]"') from None
        from latentrt.runtime.api import load
        from latentrt.runtime.ranks import launch
        from latentrt.runtime.server.app import Settings

    launch.join()  # before a socket is taken: other ranks of a cluster launcher serve nothing
    keys = tuple(api_key or filter(None, [os.environ.get(KEY_VARIABLE)]))
    settings = Settings(
        model=name or bundle.resolve().name, api_keys=keys, origins=tuple(allow_origin or ()), max_waiting=max_waiting,
        max_body=max_body, drain_seconds=drain_seconds, version=__version__,
    )  # fmt: skip
    options = {"target": target, "cache_tokens": cache_tokens, "threads": threads, "backend": backend, "device": device,
               "drafts": drafts, "ranks": ranks, "batch_invariant": batch_invariant}  # fmt: skip
    if replicas:
        return _on_ray(bundle, options, settings, replicas, max_replicas, host, port)
    sockets = process.listen(host, port)
    return process.run(load(bundle, **options), settings, sockets)


def _on_ray(bundle: Path, options: dict, settings, replicas: int, max_replicas: int, host: str, port: int) -> int:
    """The same on Ray Serve. What is wrong with the bundle is said here, and not in the log of a replica."""
    from latentrt.runtime import backends
    from latentrt.runtime.backends.base import BackendOptions
    from latentrt.runtime.bundle.reader import Bundle

    try:
        from latentrt.runtime.replicas import ray_serve
    except ImportError as error:
        raise RequestError(f'{error.name} is not installed; pip install "latentrt[server,ray]"') from None
    if max_replicas and max_replicas < replicas:
        raise RequestError(f"max_replicas is {max_replicas}, accepted: {replicas} (replicas) or more")
    opened = Bundle(bundle)
    _, target = opened.target(options["target"])
    asked = BackendOptions(device=options["device"], batch_invariant=options["batch_invariant"])
    backends.check(opened, options["target"], options["backend"], asked)
    on_gpus = options["device"].startswith("cuda") or (options["device"] == "auto" and target.compute_capability is not None)
    copies = ray_serve.Copies(replicas, max_replicas, gpus=target.ranks if on_gpus else 0)
    return ray_serve.run(ray_serve.Loading(str(bundle.absolute()), options), settings, copies, host, port)
