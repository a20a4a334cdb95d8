"""The command serve: OpenAI's API over a bundle."""

import os
from typing import Annotated

import typer

from latentrt import __version__, interrupt
from latentrt.commands.options import BackendName, BundlePath, Device, Ranks, TargetName
from latentrt.commands.run import CacheTokens, Drafts, Threads
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
    target: TargetName = None, threads: Threads = 0, cache_tokens: CacheTokens = None, drafts: Drafts = 0,
    backend: BackendName = None, device: Device = "auto", ranks: Ranks = None,
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
    sockets = process.listen(host, port)
    return process.run(load(bundle, target, cache_tokens, threads, backend, device, drafts, ranks), settings, sockets)
