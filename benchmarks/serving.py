"""The server under load, and what it costs beside the engine's steps.

    python -m benchmarks.serving soak BUNDLE --minutes 30    mixed load: memory, pages, ends of streams
    python -m benchmarks.serving loop BUNDLE                 time outside the backend's step at 1, 8 and 32 sequences
    python -m benchmarks.serving lag BUNDLE                  the event loop's lag while a long prompt is read, and for grammars
    python -m benchmarks.serving drafts BUNDLE               guesses ahead: how many are right, and what they gain
    python -m benchmarks.serving load BUNDLE                 throughput and latency, by guidellm and aiperf where they are; with
                                                             --llama-server and --gguf in turn with llama.cpp's server

BUNDLE: of the example model, as `latentrt build examples/tiny-deepseek-v2` makes it. Results: docs/results.md.
"""

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import httpx
import typer

from benchmarks import load_generators

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE")]
EXAMPLE = Path("examples/tiny-deepseek-v2")
WORDS = [
    "def", "class", "import", "return", "path", "file", "self", "name", "value", "list", "read", "write", "open", "close",
    "data", "time", "error", "test", "index",
]  # fmt: skip
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["n"],
          "additionalProperties": False}  # fmt: skip
PAGE = 4096  # bytes, of /proc/*/statm


@asynccontextmanager
async def server(command: list[str], url: str | None = None) -> AsyncIterator[tuple[str, int]]:
    """A server's address and process id; without `url` it prints the address. It is healthy on entering."""
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(command, stdout=subprocess.PIPE if url is None else log, stderr=log, text=True)
        try:
            address = url or child.stdout.readline().split()[3].removesuffix("/v1")
            async with httpx.AsyncClient(base_url=address) as client:
                while not await healthy(client):
                    await asyncio.sleep(0.1)
            yield address, child.pid
        finally:
            child.terminate()
            print("server ends with status", await asyncio.to_thread(child.wait, 120))


async def healthy(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health")).status_code == 200
    except httpx.TransportError:
        return False


def latentrt(bundle: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "latentrt", "serve", str(bundle), "--port", "0", *options]


class Soak:
    """Clients of all kinds, good and bad, and what came of their requests."""

    def __init__(self, client: httpx.AsyncClient, until: float):
        self.client, self.until, self.random, self.seen = client, until, random.Random(0), Counter()
        self.kinds: list[Callable] = [
            self.answer, self.answer, self.stream, self.stream, self.stream, self.vanish, self.vanish, self.chat, self.bound,
            self.malformed, self.too_long, self.echo,
        ]  # fmt: skip

    def prompt(self, longest: int = 60) -> str:
        """Some begin alike."""
        words = self.random.choices(WORDS, k=self.random.randint(1, longest))
        return " ".join([*(WORDS * 3)[: self.random.choice([0, 0, 20, 50])], *words])

    async def run(self) -> None:
        while time.monotonic() < self.until:
            kind = self.random.choice(self.kinds)
            try:
                self.seen[f"{kind.__name__}: {await kind()}"] += 1
            except httpx.HTTPError as error:
                self.seen[f"{kind.__name__}: {type(error).__name__}"] += 1

    def body(self, **fields) -> dict:
        new = self.random.randint(1, 60)
        return {"prompt": self.prompt(), "max_tokens": new, "temperature": self.random.choice([0, 0.8]),
                "ignore_eos": True} | fields  # fmt: skip

    async def answer(self) -> str:
        body = self.body(n=self.random.randint(1, 3))
        response = await self.client.post("/v1/completions", json=body)
        if response.status_code != 200:
            return str(response.status_code)
        usage = response.json()["usage"]
        return "whole" if usage["completion_tokens"] == body["n"] * body["max_tokens"] else f"wrong {usage}"

    async def stream(self) -> str:
        async with self.client.stream("POST", "/v1/completions", json=self.body(stream=True)) as response:
            if response.status_code != 200:
                return str(response.status_code)
            text = "".join([piece async for piece in response.aiter_text()])
        return "whole" if text.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in text else "WITHOUT AN END"

    async def vanish(self) -> str:
        body = self.body(stream=True, max_tokens=400)
        async with self.client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                return str(response.status_code)
            async for _ in response.aiter_bytes():
                return "left"
        return "nothing came"

    async def chat(self) -> str:
        messages = [{"role": "user", "content": self.prompt(30)}]
        for _ in range(self.random.randint(1, 3)):
            body = {"messages": messages, "max_tokens": 30, "temperature": 0}
            response = await self.client.post("/v1/chat/completions", json=body)
            if response.status_code != 200:
                return str(response.status_code)
            messages += [response.json()["choices"][0]["message"], {"role": "user", "content": "And?"}]
        return "whole"

    async def bound(self) -> str:
        body = self.body(ignore_eos=False, max_tokens=100, guided_json=SCHEMA)
        response = await self.client.post("/v1/completions", json=body)
        if response.status_code != 200:
            return str(response.status_code)
        choice = response.json()["choices"][0]
        if choice["finish_reason"] == "length":
            return "cut"
        return "whole" if 0 <= json.loads(choice["text"])["n"] < 100 else "wrong"

    async def malformed(self) -> str:
        content = self.random.choice([b"{", b"\xff\xfe", b"[" * 9999, b'{"prompt": {}}', b"", b'{"prompt": "a", "n": -1}'])
        return str((await self.client.post("/v1/completions", content=content)).status_code)

    async def too_long(self) -> str:
        return str((await self.client.post("/v1/completions", json=self.body(prompt="word " * 9000))).status_code)

    async def echo(self) -> str:
        response = await self.client.post("/v1/completions", json=self.body(echo=True, logprobs=1, max_tokens=1))
        return "whole" if response.status_code == 200 else str(response.status_code)


def resident(pid: int) -> float:
    """MB of private and shared memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / 1e6


async def metrics(client: httpx.AsyncClient) -> dict[str, float]:
    lines = [line for line in (await client.get("/metrics")).text.splitlines() if line.startswith("vllm:")]
    return {name.partition("{")[0].removeprefix("vllm:"): float(value) for name, _, value in (s.rpartition(" ") for s in lines)}


@app.command()
def soak(bundle: BundlePath, minutes: float = 30, clients: int = 24, cache_tokens: int = 4096, report: float = 60) -> None:
    """Mixed load on a cache that is too small for it."""
    asyncio.run(_soak(bundle, minutes, clients, cache_tokens, report))


async def _soak(bundle: Path, minutes: float, clients: int, cache_tokens: int, report: float) -> None:
    options = "--cache-tokens", str(cache_tokens), "--max-waiting", "16", "--drafts", "3"
    async with server(latentrt(bundle, *options)) as (url, pid):
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            load, start = Soak(client, time.monotonic() + 60 * minutes), time.monotonic()
            running = [asyncio.create_task(load.run()) for _ in range(clients)]
            while not all(task.done() for task in running):
                await asyncio.wait(running, timeout=report)
                minute, files = (time.monotonic() - start) / 60, len(os.listdir(f"/proc/{pid}/fd"))
                print(f"{minute:5.1f} min {resident(pid):7.1f} MB {files} files {sum(load.seen.values())} requests", flush=True)
            [task.result() for task in running]
            found = await metrics(client)
            while found["num_requests_running"] or found["kv_cache_usage_perc"]:
                found = await metrics(client)  # the last who vanished
            print(f"in the end {resident(pid):.1f} MB, pages in use {found['kv_cache_usage_perc']:.0%}, "
                  f"{found['generation_tokens_total']:.0f} tokens of answers")  # fmt: skip
        print("\n".join(f"{name:28} {count}" for name, count in sorted(load.seen.items())))


@app.command()
def loop(bundle: BundlePath, new: int = 300) -> None:
    """The step loop's own time: of its thread's processor time what is not the backend's, sampling included."""
    import latentrt
    from latentrt.runtime.sampling_params import SamplingParams

    with latentrt.load(bundle) as engine:
        print("| sequences | sampling | backend | outside | share |\n|---|---|---|---|---|")
        for count in (1, 8, 32):
            for name, given in (("greedy", {}), ("top-p 0.9", {"temperature": 0.8, "top_p": 0.9, "seed": 1})):
                inside, outside = _steps(engine, count, SamplingParams(max_new_tokens=new, ignore_eos=True, **given))
                share = outside / (inside + outside)
                print(f"| {count} | {name} | {inside * 1e3:.3f} ms | {outside * 1e3:.3f} ms | {share:.0%} |")


def _steps(engine, count: int, params) -> tuple[float, float]:
    """Median seconds of the backend in a step, and of this thread's processor outside it, while `count` sequences decode."""
    real, inside, outside, sink = engine.backend.step, [], [], deque()

    def step(batch):
        start, used = time.perf_counter(), time.thread_time()
        result = real(batch)
        inside.append(time.perf_counter() - start)
        outside[-1] -= time.thread_time() - used
        return result

    sequences = [engine.sequence([5 + n] * 30, params, sink, n) for n in range(count)]
    engine.loop.add(sequences)
    engine.backend.step = step
    try:
        while not all(sequence.ended for sequence in sequences):
            start = time.thread_time()
            outside.append(0.0)
            engine.loop.step()
            outside[-1] += time.thread_time() - start
            sink.clear()  # as whoever reads the events does
    finally:
        engine.backend.step = real
    return statistics.median(inside[5:-5]), statistics.median(outside[5:-5])


@app.command()
def drafts(bundle: BundlePath, held_out: Path = EXAMPLE / "held_out.txt", new: int = 128) -> None:
    """Greedy answers to pieces of the example's held-out text, code and questions, with and without guesses, in turn."""
    import latentrt
    from latentrt.runtime.sampling_params import SamplingParams

    text = held_out.read_text()
    code = [text[at : at + 600] for at in range(0, 24 * 3000, 3000)]
    asked = ["What does os.path.join do?", "How do I read a file?", "What is a list?", "Explain the class Thread.",
             "What does json.dumps return?", "How are dictionaries sorted?"]  # fmt: skip
    params = SamplingParams(max_new_tokens=new, ignore_eos=True)
    engines = {count: latentrt.load(bundle, drafts=count, threads=1) for count in (0, 2, 4)}
    chats = [engines[0].chat_tokens([{"role": "user", "content": text}]) for text in asked]
    print("| text | guesses a step | right | tokens a second | ratio |\n|---|---|---|---|---|")
    for name, prompts in (("code", code), ("chat", chats)):
        seconds, right, answers = {count: [] for count in engines}, {}, {}
        for _ in range(3):
            for count, engine in engines.items():
                (scheduler,) = engine.loop.schedulers.ranks
                before, start = (scheduler.drafted_tokens, scheduler.accepted_tokens), time.perf_counter()
                answers[count] = [engine.generate([prompt], params)[0].token_ids for prompt in prompts]
                seconds[count].append(time.perf_counter() - start)
                right[count] = (scheduler.accepted_tokens - before[1]) / max(scheduler.drafted_tokens - before[0], 1)
        same = all(answers[count] == answers[0] for count in engines)
        for count in engines:
            rate = len(prompts) * new / statistics.median(seconds[count])
            ratio = statistics.median(seconds[0]) / statistics.median(seconds[count])
            print(f"| {name} | {count} | {right[count]:.0%} | {rate:.0f} | {ratio:.2f} |")
        print(f"{name}: tokens are {'the same' if same else 'NOT the same'}")


@app.command()
def lag(bundle: BundlePath, rounds: int = 20, rows: int = 0) -> None:
    """How late a task of the event loop wakes up while the engine reads a prompt of ROWS tokens in one step (0: the longest),
    and while large JSON schemas are compiled, each another one."""
    asyncio.run(_lag(bundle, rounds, rows))


async def _lag(bundle: Path, rounds: int, rows: int) -> None:
    import latentrt
    from latentrt.runtime.api import Engine
    from latentrt.runtime.sampling_params import SamplingParams
    from latentrt.runtime.service import Ask, EngineService
    from latentrt.runtime.structured import Constraint

    loaded = latentrt.load(bundle, threads=1)
    rows = rows or min(loaded.limits.max_context, loaded.limits.max_batch_tokens) - 8
    service = EngineService(Engine(loaded.bundle, loaded.backend, chunk=rows))
    await service.start()
    one = SamplingParams(max_new_tokens=1)
    asks = [Ask([n % 50 + 5] * rows, one, salt=str(n)) for n in range(rounds)]
    _tell_lag(f"a step of {rows} tokens", *await _lags(service, asks))
    if loaded.tokenizer:
        asks = [Ask([5], replace(one, constraint=Constraint("json_schema", _schema(n)))) for n in range(rounds)]
        _tell_lag("an answer that follows a new schema", *await _lags(service, asks))
    await service.stop()


async def _lags(service, asks: list) -> tuple[list[float], list[float]]:
    """Seconds by which one millisecond's sleeps were late meanwhile, and seconds that each took: asked one after another."""
    late, took = [], []

    async def answer(ask) -> None:
        async for _ in await service.submit([ask]):
            pass

    for ask in asks:
        asked, running = time.perf_counter(), asyncio.ensure_future(answer(ask))
        while not running.done():
            start = time.perf_counter()
            await asyncio.sleep(0.001)
            late.append(time.perf_counter() - start - 0.001)
        running.result()
        took.append(time.perf_counter() - asked)
    return sorted(late), took


def _tell_lag(what: str, late: list[float], took: list[float]) -> None:
    print(f"{what} takes {statistics.median(took) * 1e3:.0f} ms; lag of the event loop: "
          f"p50 {late[len(late) // 2] * 1e3:.2f} ms, p99 {late[len(late) * 99 // 100] * 1e3:.2f} ms, "
          f"largest {late[-1] * 1e3:.2f} ms of {len(late)}")  # fmt: skip


def _schema(n: int) -> dict:
    """A large schema that no other number gives."""
    parts = {f"part_{i}": {"enum": [f"value {n} {i} {k}" for k in range(20)]} for i in range(20)}
    rows = {f"row_{i}": {"type": "object", "properties": parts, "required": list(parts)} for i in range(40)}
    return {"type": "object", "properties": rows, "required": list(rows)}


@app.command()
def load(
    bundle: BundlePath, checkpoint: Annotated[Path, typer.Option(help="Has the tokenizer, for guidellm and aiperf.")] = EXAMPLE,
    llama_server: Annotated[Path | None, typer.Option(help="llama.cpp's server, of its sources.")] = None,
    gguf: Annotated[Path | None, typer.Option(help="The same weights, as benchmarks.gguf_checkpoint writes them.")] = None,
    guidellm: Annotated[str, typer.Option(help="The program, on PATH or in a virtual environment of its own.")] = "guidellm",
    aiperf: Annotated[str, typer.Option(help="The same.")] = "aiperf",
    clients: int = 8, requests: int = 64, new: int = 128, rounds: int = 3, port: int = 18080, threads: int = 2,
) -> None:  # fmt: skip
    """Streams of completions from `clients` at once, asked by each load generator that is there: of this server, and in turn
    of llama.cpp's where it is given. The table has medians of all rounds."""
    context = clients * 1024
    sides = {"latentrt": (latentrt(bundle, "--threads", str(threads), "--cache-tokens", str(context)), None)}
    if llama_server and gguf:
        theirs = [str(llama_server), "-m", str(gguf), "--port", str(port), "-np", str(clients), "-c", str(context),
                  "-t", str(threads)]  # fmt: skip
        sides["llama.cpp"] = theirs, f"http://127.0.0.1:{port}"
    else:
        print("llama.cpp's server: skipped, --llama-server and --gguf are not given")
    asked = load_generators.Asked(clients, requests, new, checkpoint.resolve())
    generators = load_generators.found({"guidellm": guidellm, "aiperf": aiperf})
    results = {(name, side): [] for name in generators for side in sides}
    for _ in range(rounds):
        for side, (command, url) in sides.items():
            for name, found in asyncio.run(_load(command, url, generators, asked)).items():
                results[name, side].append(found)
    print("| generator | server | tokens a second | first token p50, p99 | between tokens p50, p99 |\n|---|---|---|---|---|")
    for (name, side), its in results.items():
        rate, *times = (statistics.median(column) for column in zip(*its, strict=True))
        first, late, between, slow = (f"{t * 1e3:.1f} ms" for t in times)
        print(f"| {name} | {side} | {rate:.0f} | {first}, {late} | {between}, {slow} |")


async def _load(command: list[str], url: str | None, generators: dict, asked: load_generators.Asked) -> dict:
    """What each generator measures of one server."""
    async with server(command, url) as (address, _):
        return {name: await generate(address, asked) for name, generate in generators.items()}


if __name__ == "__main__":
    app()
