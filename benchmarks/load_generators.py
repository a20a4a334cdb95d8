"""Load on a server of OpenAI's completions: by guidellm and aiperf, which others wrote, and by a few lines of our own.

Each gives the same five numbers. guidellm and aiperf have large installs, so each lives in a virtual environment of its own:

    python -m venv DIR && DIR/bin/pip install guidellm==0.8.1        DIR/bin/guidellm is the program; aiperf==0.13.0 likewise

llama.cpp's server for `benchmarks.serving load` is compiled from the sources in PyPI's llama-cpp-python (0.3.36 was used):

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xzf llama_cpp_python-0.3.36.tar.gz
    cd llama_cpp_python-0.3.36/vendor/llama.cpp && cmake -B build -DGGML_NATIVE=ON -DLLAMA_OPENSSL=OFF \\
        -DLLAMA_BUILD_WEBUI=OFF -DBUILD_SHARED_LIBS=OFF && cmake --build build --target llama-server
"""

import asyncio
import json
import os
import random
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import httpx

PROMPT = 100  # tokens of a prompt, about
WORDS = ["def", "class", "import", "return", "path", "file", "self", "name", "value", "list", "read", "write", "open", "close"]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # aiperf takes a tokenizer's folder only without them


class Found(NamedTuple):
    """Tokens a second of all answers; seconds to the first token, and between tokens."""

    rate: float
    first_p50: float
    first_p99: float
    between_p50: float
    between_p99: float


@dataclass(frozen=True)
class Asked:
    """`requests` streams of `new` tokens each, `clients` at once; checkpoint: a folder with the tokenizer."""

    clients: int
    requests: int
    new: int
    checkpoint: Path


Generate = Callable[[str, Asked], Awaitable[Found]]


def found(programs: dict[str, str]) -> dict[str, Generate]:
    """The generators that are there, by name; `programs` says where the others' are. One line names each that is missing."""
    generators: dict[str, Generate] = {"own": own}
    for name, program in programs.items():
        path = shutil.which(program)
        if path:
            generators[name] = partial({"guidellm": guidellm, "aiperf": aiperf}[name], path)
        else:
            print(f"{name}: skipped, {program} is not there (--{name} names it)")
    return generators


async def own(address: str, asked: Asked) -> Found:
    """Streams of completions, each chunk one token."""
    generator = random.Random(1)
    prompts = deque(" ".join(generator.choices(WORDS, k=PROMPT)) for _ in range(asked.requests))
    first, between = [], []
    fresh = httpx.Limits(max_keepalive_connections=0)  # llama.cpp's server closes those that were used a few times
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=fresh) as client:
        await _stream(client, "def", 8, [], [])

        async def one() -> None:
            while prompts:
                await _stream(client, prompts.popleft(), asked.new, first, between)

        start = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(asked.clients)))
        seconds = time.perf_counter() - start
    return Found(asked.requests * asked.new / seconds, *_percentiles(first), *_percentiles(between))


async def _stream(client: httpx.AsyncClient, prompt: str, new: int, first: list[float], between: list[float]) -> None:
    body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": True, "cache_prompt": False}
    start = last = time.perf_counter()
    tokens = 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                now = time.perf_counter()
                (between if tokens else first).append(now - last)
                last, tokens = now, tokens + 1
    assert time.perf_counter() > start and tokens >= new * 0.5, (tokens, new)


def _percentiles(seconds: list[float]) -> tuple[float, float]:
    ordered = sorted(seconds)
    return ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]


async def guidellm(program: str, address: str, asked: Asked) -> Found:
    """guidellm 0.8's concurrent profile over synthetic prompts."""
    with tempfile.TemporaryDirectory() as folder:
        report, model = Path(folder) / "report.json", await _model(address)
        await _run(
            program, "run", "--backend", f"kind=openai_http,target={address},model={model},request_format=/v1/completions",
            "--profile", f"kind=concurrent,streams={asked.clients}",
            "--constraint", f"kind=max_requests,count={asked.requests}",
            "--tokenizer", f"kind=huggingface_auto,model={asked.checkpoint}",
            "--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={asked.new}",
            "--output", f"kind=json,path={report}", "--disable-console", folder=folder, variables=OFFLINE,
        )  # fmt: skip
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    assert metrics["request_totals"]["successful"] == asked.requests, metrics["request_totals"]
    rate = metrics["output_tokens_per_second"]["successful"]["mean"]
    times = (metrics[f"{name}_ms"]["successful"]["percentiles"] for name in ("time_to_first_token", "inter_token_latency"))
    return Found(rate, *(its[p] / 1e3 for its in times for p in ("p50", "p99")))


async def aiperf(program: str, address: str, asked: Asked) -> Found:
    """aiperf 0.13's profile with a number of requests at once."""
    with tempfile.TemporaryDirectory() as folder:
        await _run(
            program, "profile", "--model", await _model(address), "--url", address,
            "--endpoint-type", "completions", "--streaming", "--tokenizer", str(asked.checkpoint),
            "--concurrency", str(asked.clients), "--request-count", str(asked.requests),
            "--synthetic-input-tokens-mean", str(PROMPT), "--synthetic-input-tokens-stddev", "0",
            "--output-tokens-mean", str(asked.new), "--output-tokens-stddev", "0", "--extra-inputs", "ignore_eos:true",
            "--connection-reuse-strategy", "never", "--artifact-dir", folder, "--ui", "none", folder=folder,
        )  # fmt: skip
        report = json.loads(next(Path(folder).rglob("profile_export_aiperf.json")).read_text())
    assert report["request_count"]["avg"] == asked.requests, report["request_count"]
    times = (report[name] for name in ("time_to_first_token", "inter_token_latency"))
    return Found(report["output_token_throughput"]["avg"], *(its[p] / 1e3 for its in times for p in ("p50", "p99")))


async def _model(address: str) -> str:
    async with httpx.AsyncClient(base_url=address) as client:
        return (await client.get("/v1/models")).json()["data"][0]["id"]


async def _run(*command: str, folder: str, variables: dict[str, str] = {}) -> None:
    """Runs a program in a folder; what it says is shown if it fails."""
    streams = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.STDOUT}
    child = await asyncio.create_subprocess_exec(*command, cwd=folder, env=os.environ | variables, **streams)
    told, _ = await child.communicate()
    if child.returncode:
        raise RuntimeError(f"{command[0]} ends with status {child.returncode}:\n{told.decode(errors='replace')[-4000:]}")
