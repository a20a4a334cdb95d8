"""Kills a replica under load, and counts how every request ended. On Ray Serve or Dynamo, two replicas on this machine.

`python -m benchmarks.replicas ray BUNDLE` (pip install "ray[serve]==2.60.0"), or `dynamo BUNDLE`; see docs/replicas.md.
Every stream must end with [DONE], an error event before it or not; one that just stops is silent, and a fault.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import httpx
import typer

START_SECONDS = 180
app = typer.Typer()


class Load:
    """Clients that stream completions one after another until they are told to stop, and how these ended."""

    def __init__(self, url: str, clients: int, tokens: int):
        self.url, self.tokens = url, tokens
        self.ends: list[tuple[float, str]] = []  # when, how
        self._stop, self._threads = threading.Event(), []
        for number in range(clients):
            self._threads.append(threading.Thread(target=self._run, args=(number,)))
            self._threads[-1].start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        with httpx.Client(timeout=60) as client:
            asked = 0
            while not self._stop.is_set():
                asked += 1
                body = {"prompt": f"# client {number}, request {asked}\ndef ", "max_tokens": self.tokens, "ignore_eos": True,
                        "temperature": 0, "stream": True, "model": "model"}  # fmt: skip
                self.ends.append((time.monotonic(), self._end(client, body)))

    def _end(self, client: httpx.Client, body: dict) -> str:
        try:
            with client.stream("POST", f"{self.url}/v1/completions", json=body) as response:
                text = "".join(response.iter_text())
        except httpx.HTTPError as error:
            return f"silent: {type(error).__name__}"
        if response.status_code != 200:
            return f"refused: {response.status_code}"
        if "data: [DONE]" not in text:
            return "silent: no [DONE]"
        return "told" if 'data: {"error"' in text or "event: error" in text else self._whole(text)

    def _whole(self, text: str) -> str:
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        reasons = [c["finish_reason"] for e in events for c in e.get("choices", []) if c.get("finish_reason")]
        return "whole" if reasons == ["length"] else f"silent: finish_reason {reasons}"


def _named(words: str) -> list[int]:
    """Processes whose command line has these words."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if words in file.read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                found.append(int(file.parent.name))
    return found


def _until(true, seconds: float, what: str) -> float:
    """How long it took."""
    start = time.monotonic()
    while not true():
        if time.monotonic() - start > seconds:
            sys.exit(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.05)
    return time.monotonic() - start


def _answers(url: str) -> bool:
    try:
        body = {"prompt": "x", "max_tokens": 1, "model": "model"}
        return httpx.post(f"{url}/v1/completions", json=body, timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


def measure(url: str, words: str, replicas: int, clients: int, tokens: int) -> dict:
    """Kills one of the processes whose command line has `words`, after 3 s of load."""
    started = _until(lambda: _answers(url), START_SECONDS, "the service")
    _until(lambda: len(_named(words)) == replicas, START_SECONDS, "replicas")
    load = Load(url, clients, tokens)
    time.sleep(3)
    victim = _named(words)[0]
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    back = _until(lambda: len([p for p in _named(words) if p != victim]) == replicas, START_SECONDS, "a new replica")
    time.sleep(6)
    load.stop()
    after = [end for when, end in load.ends if when >= killed]
    last_fault = max((when - killed for when, end in load.ends if when >= killed and end != "whole"), default=0.0)
    return {
        "start_seconds": round(started, 1), "requests": len(load.ends), "ends": dict(Counter(end for _, end in load.ends)),
        "after_the_kill": len(after), "silent": sum(end.startswith("silent") for _, end in load.ends),
        "new_process_seconds": round(back, 1), "last_request_that_failed_seconds": round(last_fault, 1),
    }  # fmt: skip


Bundle = Annotated[Path, typer.Argument(help="A bundle for this machine.")]
Clients = Annotated[int, typer.Option(help="Streams at once.")]
Tokens = Annotated[int, typer.Option(help="Tokens of each answer.")]


@app.callback()
def _root() -> None:
    """One replica killed under load."""


@app.command()
def ray(bundle: Bundle, clients: Clients = 12, tokens: Tokens = 60, port: int = 8123) -> None:
    """Two replicas on Ray Serve, by `latentrt serve --replicas 2`."""
    command = [sys.executable, "-m", "latentrt", "serve", str(bundle), "--replicas", "2", "--port", str(port),
               "--served-model-name", "model", "--threads", "1"]  # fmt: skip
    with subprocess.Popen(command, env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}) as served:
        try:
            found = measure(f"http://127.0.0.1:{port}", "ray::ServeReplica:latentrt:replica", 2, clients, tokens)
        finally:
            served.terminate()
    print(json.dumps({"engine": "Ray Serve", "clients": clients, "tokens": tokens} | found))


@app.command()
def dynamo(bundle: Bundle, clients: Clients = 12, tokens: Tokens = 60, port: int = 8124) -> None:
    """Two workers and a frontend of Dynamo, which find each other through a folder."""
    local = {name: "127.0.0.1" for name in ("DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST", "DYN_SYSTEM_HOST")}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        environment = os.environ | local | {"DYN_FILE_KV": folder}
        frontend = ["dynamo.frontend", "--router-mode", "kv", "--no-router-kv-events", "--discovery-backend", "file",
                    "--http-host", "127.0.0.1", "--http-port", str(port), "--migration-limit", "3"]  # fmt: skip
        worker = ["latentrt.runtime.replicas.dynamo_worker", str(bundle), "--model", "model", "--threads", "1"]

        def start(arguments: list[str]) -> None:
            process = stack.enter_context(subprocess.Popen([sys.executable, "-m", *arguments], env=environment))
            stack.callback(process.terminate)

        start(frontend)
        for _ in range(2):
            start(worker)
        restarting = threading.Thread(target=_restart, args=(start, worker), daemon=True)
        restarting.start()
        found = measure(f"http://127.0.0.1:{port}", worker[0], 2, clients, tokens)
        print(json.dumps({"engine": "Dynamo", "clients": clients, "tokens": tokens} | found), flush=True)
        _stopped.set()


_stopped = threading.Event()


def _restart(start, worker: list[str]) -> None:
    """What Kubernetes or systemd does: a worker that is gone is started again."""
    _until(lambda: len(_named(worker[0])) == 2, START_SECONDS, "workers")
    while not _stopped.wait(0.2):
        if len(_named(worker[0])) < 2:
            start(worker)
            _until(lambda: len(_named(worker[0])) == 2, START_SECONDS, "a worker")




if __name__ == "__main__":
    app()
