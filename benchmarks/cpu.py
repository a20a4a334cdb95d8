"""The CPU target beside llama.cpp and transformers, on the same machine and the same weights, in one alternating run.

    python -m benchmarks.cpu --work /tmp/b9                              # an 8-layer stand-in, all sides
    python -m benchmarks.cpu --work /tmp/v2lite --model v2-lite          # V2-Lite's 27 layers, int4 beside Q4_0

--work keeps random stand-ins, bundles, GGUF files and llama.cpp (PyPI's source package llama-cpp-python compiled for this
machine, about 10 minutes on two cores, in a virtual environment of its own) for the next run. V2-Lite goes without a bf16
checkpoint of 31 GB: its random tensors are written as a Q8_0 GGUF file of 17 GB, from which the bundles are built.

Every side is a process of its own with the same number of threads; a call repeats the same step over the same cache; sides take
turns, with a pause in between, because idle threads of some engines spin for a while. Weights are random, as only shapes matter
for time. Q4_0 and Q8_0 files are pure: head and embedding too, where `llama-quantize` would give the head Q6_K, while our int4
keeps some matrices at 8 bits; so compare "KL" before speed. A side that cannot run a case has "-" and a reason in the JSON.

ik_llama.cpp (--sides ik:q4_0): ik-llama-cpp-python 0.1.5 did not compile from its source package (it asks Git for a commit).
With that package in WORK/llama/ikvenv the side is tried, with V2-Lite only: it takes a null q_lora_rank at 26 and 27 layers.
The side never ran. Other work on the machine makes all numbers noise: look at the load average in the JSON.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import gguf
import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import gguf_checkpoint
from benchmarks.gguf_checkpoint import registry
from latentrt import builder
from latentrt.export.options import BuildOptions
from latentrt.runtime import backends
from latentrt.runtime.backends.base import SequenceRows, pack
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.engine.pages import LatentCache

ROOT = Path(__file__).resolve().parents[1]
LLAMA = "llama-cpp-python==0.3.36"
SHAPE = dict(
    vocab_size=32000, hidden_size=1024, intermediate_size=4096, moe_intermediate_size=512, num_hidden_layers=8,
    num_attention_heads=16, num_key_value_heads=16, n_shared_experts=2, n_routed_experts=32, num_experts_per_tok=6,
    first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0, max_position_embeddings=16384,
)  # fmt: skip
CASES = {  # sequences, tokens in the cache, new tokens
    **{f"decode, batch {b}, depth {d}": (b, d, 1) for b in (1, 8) for d in (0, 512, 4096, 8192)},
    "prompt of 512": (1, 0, 512), "prompt of 2048": (1, 0, 2048), "prompt of 512, depth 8192": (1, 8192, 512),
}  # fmt: skip
QUICK = ("decode, batch 1, depth 512", "decode, batch 8, depth 512", "prompt of 512")
SIDES = {  # engine, file or folder under --work
    "fp32": ("ours", "fp32"), "int8": ("ours", "int8"), "int4": ("ours", "int4"),
    "llama:q8_0": ("llama.cpp", "Q8_0.gguf"), "llama:q4_0": ("llama.cpp", "Q4_0.gguf"),
    "ik:q4_0": ("ik_llama.cpp", "Q4_0.gguf"), "bf16": ("transformers", "ckpt"),
}  # fmt: skip
DEFAULT = {"small": "fp32,int8,int4,llama:q8_0,llama:q4_0,bf16", "v2-lite": "int4,llama:q4_0"}
PAUSE = 0.5  # seconds before each turn: what an engine's idle threads spin, at most
STEPS = 3  # decode steps in a row, after one that is not timed, each time that it is a side's turn


class Engine:
    """One of our bundles, at a fixed context: every call repeats the same step over the same cache."""

    def __init__(self, bundle: Path, batch: int, context: int, new: int, **options):
        self.backend = backends.load(Bundle(bundle), cache_tokens=batch * (context + new + 64), **options)
        cache = LatentCache(self.backend.num_pages, self.backend.target.cache.page_size)
        for b in range(batch):
            cache.reserve(b, context + new)
        tokens = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (batch, new))
        rows = [SequenceRows(t, context, [new - 1]) for t in tokens]
        self.batch = pack(rows, cache.block_table(list(range(batch))))

    def __call__(self) -> None:
        self.backend.step(self.batch).logits()


class Worker:
    """A side in its own process: benchmarks/sides.py. RuntimeError with what the side said, or the end of its log."""

    def __init__(self, name: str, work: Path, threads: int):
        engine, model = SIDES[name]
        self.log = work / f"{name.replace(':', '-')}.log"
        command = [str(python_of(engine, work)), str(ROOT / "benchmarks" / "sides.py"), engine, str(work / model), str(threads)]
        environment = os.environ | ({"PYTHONPATH": str(ROOT)} if engine in ("ours", "transformers") else {})
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True, env=environment
        )
        self.loaded = self._answer()
        self.loaded["added"] = self.loaded["private"] - self.loaded["before"]

    def ask(self, **line) -> dict:
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"process ended with {self.process.wait()}: {self.log.read_text()[-500:]}")
        found = json.loads(line)
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def python_of(engine: str, work: Path) -> Path:
    """The interpreter that has the engine; compiles llama.cpp the first time."""
    if engine in ("ours", "transformers"):
        return Path(sys.executable)
    folder = work / "llama" / {"llama.cpp": "venv", "ik_llama.cpp": "ikvenv"}[engine]
    python = folder / "bin" / "python"
    if engine == "llama.cpp" and subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode if (
        python.exists()) else engine == "llama.cpp":  # fmt: skip
        subprocess.check_call([sys.executable, "-m", "venv", folder])
        environment = os.environ | {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CMAKE_BUILD_PARALLEL_LEVEL": str(cores())}
        source = ["--no-binary", "llama-cpp-python", LLAMA, "numpy"]
        subprocess.check_call([python, "-m", "pip", "install", "--quiet", *source], env=environment)
    if not python.exists():
        raise RuntimeError(f"{python} is missing")
    return python


def cores() -> int:
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class StandIn:
    """The weights that all sides have, under `work`."""

    model: str
    work: Path

    @property
    def raw(self) -> dict:
        """config.json's content."""
        if self.model == "small":
            return json.loads((self.work / "ckpt" / "config.json").read_text())
        return json.loads((ROOT / "tests" / "configs" / "v2_lite.json").read_text())

    def make(self, names: list[str]) -> None:
        """Whatever of the sides' files is missing."""
        self.work.mkdir(parents=True, exist_ok=True)
        if self.model == "small":
            self._once("ckpt", make_checkpoint)
        source = self.work / ("ckpt" if self.model == "small" else "Q8_0.gguf")
        wanted = dict.fromkeys(SIDES[name][1] for name in names if SIDES[name][1] != "ckpt")
        if self.model != "small" and any(not (self.work / w).exists() for w in wanted if not w.endswith("gguf")):
            wanted = {"Q8_0.gguf": None} | wanted
        for file in wanted:
            if file.endswith(".gguf"):
                self._once(file, lambda out: gguf_checkpoint.write(registry.parse(self.raw), self._reader(), out, out.stem))
            else:
                self._once(file, lambda out: builder.build(source, out, BuildOptions(precision=out.name)))

    def _once(self, name: str, write: Callable[[Path], None]) -> None:
        if not (self.work / name).exists():
            start = time.perf_counter()
            write(self.work / name)
            Console(stderr=True).print(f"{self.work / name}: {time.perf_counter() - start:.0f} s")

    def _reader(self) -> gguf_checkpoint.Read:
        if self.model == "small":
            return gguf_checkpoint.reader_of(self.work / "ckpt")
        return gguf_checkpoint.random_reader(registry.parse(self.raw))


def make_checkpoint(folder: Path) -> None:
    """A random bf16 checkpoint of SHAPE."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(0)
    DeepseekV2ForCausalLM(DeepseekV2Config(**SHAPE)).to(torch.bfloat16).save_pretrained(folder)


def read_bytes(path: Path, raw: dict) -> int:
    """Bytes of weights that a decode step of one sequence reads: no embedding, and of the routed experts those chosen."""
    share = raw["num_experts_per_tok"] / raw["n_routed_experts"]
    routed = lambda name: "_exps" in name or ".experts." in name  # noqa: E731
    return int(sum(n * (share if routed(name) else 1) for name, n in sizes(path) if "embd" not in name and "embed" not in name))


def sizes(path: Path) -> list[tuple[str, int]]:
    """Names and bytes of the tensors of a GGUF file, a bundle or a checkpoint."""
    if path.suffix == ".gguf":
        return [(t.name, int(t.n_bytes)) for t in gguf.GGUFReader(path).tensors]
    found = []
    for file in (path / "files" if (path / "files").exists() else path).glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        found += [(k, v["data_offsets"][1] - v["data_offsets"][0]) for k, v in header.items() if k != "__metadata__"]
    return found


def bandwidth() -> float:
    """Bytes a second that all cores read together: the best of 7 sums over 2 GB."""
    torch.set_num_threads(cores())
    data = torch.ones(1 << 28, dtype=torch.int64)
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best


def alternate(workers: dict[str, Worker], case: tuple[int, int, int], rounds: int) -> dict[str, dict]:
    """Median seconds a step of each side, which take turns."""
    batch, depth, new = case
    found: dict[str, dict] = {}
    for name, worker in workers.items():
        try:
            found[name] = {"all": []} | worker.ask(do="case", batch=batch, depth=depth, new=new)
        except (RuntimeError, BrokenPipeError) as error:
            found[name] = {"reason": str(error)}
    for number in range(rounds + (new > 1)):  # the first prompt is not counted
        for name, worker in workers.items():
            if "reason" in found[name]:
                continue
            time.sleep(PAUSE)
            try:
                seconds = worker.ask(do="steps", count=STEPS + 1 if new == 1 else 1)["seconds"]
            except (RuntimeError, BrokenPipeError) as error:
                found[name]["reason"] = str(error)
                continue
            found[name]["all"] += seconds[1:] if new == 1 else seconds if number else []
    for row in found.values():
        if row.get("all") and "reason" not in row:
            row["seconds"] = statistics.median(row["all"])
    return found


def agreement(workers: dict[str, Worker], work: Path) -> dict[str, dict]:
    """Logits of one prompt of 128 tokens, each side against the first of: transformers, our most precise."""
    prompt = np.random.default_rng(1).integers(0, SHAPE["vocab_size"], 128)
    logits = {}
    for name, worker in workers.items():
        out = work / "logits.npy"
        worker.ask(do="logits", tokens=prompt.tolist(), out=str(out))
        logits[name] = torch.from_numpy(np.load(out)).double()
    reference = "bf16" if "bf16" in logits else next(iter(logits))
    mine = logits[reference].log_softmax(-1)
    found = {}
    for name, row in logits.items():
        kl = (mine.exp() * (mine - row.log_softmax(-1))).sum(-1).mean().item()
        same = (row.argmax(-1) == mine.argmax(-1)).double().mean().item()
        both = torch.stack([row - row.mean(-1, keepdim=True), logits[reference] - logits[reference].mean(-1, keepdim=True)])
        correlation = torch.nn.functional.cosine_similarity(both[0], both[1], -1).mean().item()
        found[name] = {"reference": reference, "kl": kl, "top1": same, "correlation": correlation}
    return found


def main(
    model: Annotated[str, typer.Option(help="small or v2-lite.")] = "small",
    sides: Annotated[str, typer.Option(help=f"Of: {', '.join(SIDES)}; by default what fits.")] = "",
    cases: Annotated[str, typer.Option(help="quick, all, or a part of their names.")] = "all",
    rounds: Annotated[int, typer.Option(help="Turns of each side.")] = 5,
    work: Annotated[Path, typer.Option(help="Keeps stand-ins and llama.cpp.")] = Path("/tmp/latentrt-bench"),
    out: Annotated[Path | None, typer.Option(help="JSON; benchmarks/results/cpu-MODEL.json by default.")] = None,
) -> None:
    """Prints milliseconds; writes them with machine, versions and date."""
    if model not in DEFAULT:
        raise typer.BadParameter(f"{model!r}, accepted: {', '.join(DEFAULT)}")
    names = (sides or DEFAULT[model]).split(",")
    if wrong := [name for name in names if name not in SIDES]:
        raise typer.BadParameter(f"{', '.join(wrong)}, accepted: {', '.join(SIDES)}")
    if model == "v2-lite" and (large := {"fp32", "bf16"} & set(names)):
        raise typer.BadParameter(f"{', '.join(sorted(large))}: V2-Lite's 31 to 63 GB of weights are not made")
    chosen = {k: v for k, v in CASES.items() if cases == "all" or (k in QUICK if cases == "quick" else cases in k)}
    stand_in = StandIn(model, work)
    stand_in.make(names)
    record = {
        "command": f"python -m benchmarks.cpu {' '.join(sys.argv[1:])}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{processor()}, {cores()} cores", "llama.cpp": LLAMA, "load_average": os.getloadavg(),
        "config": stand_in.raw, "bandwidth": bandwidth(), "reasons": {}, "loading": {}, "results": {},
    }  # fmt: skip
    workers = {}
    for name in names:
        try:
            workers[name] = Worker(name, work, cores())
            record["loading"][name] = workers[name].loaded
        except (RuntimeError, subprocess.CalledProcessError) as error:
            record["reasons"][name] = str(error)
    record["read_bytes"] = {name: read_bytes(work / SIDES[name][1], stand_in.raw) for name in workers}
    record["agreement"] = agreement(workers, work)
    for name, worker in workers.items():
        record["loading"][name]["after_prompt"] = worker.ask(do="memory")
    out = out or ROOT / "benchmarks" / "results" / f"cpu-{model}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for title, case in chosen.items():
        record["results"][title] = alternate(workers, case, rounds if case[2] == 1 else max(2, rounds // 2))
        out.write_text(json.dumps(record, indent=1) + "\n")
        Console(stderr=True).print(title, {k: round(1e3 * v.get("seconds", 0), 1) for k, v in record["results"][title].items()})
    for worker in workers.values():
        worker.close()
    report(record, list(workers))


def processor() -> str:
    """Model name, and the instructions that matter."""
    lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    fields = {k.strip(): v.strip() for k, v in lines.items()}
    known = [f for f in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if f in fields.get("flags", "").split()]
    return f"{fields.get('model name', platform.machine())} ({', '.join(known)})"


def report(record: dict, names: list[str]) -> None:
    """The table."""
    table = Table("ms, median", *names)
    for title, row in record["results"].items():
        table.add_row(title, *(f"{1e3 * row[n]['seconds']:.1f}" if "seconds" in row[n] else "-" for n in names))
    table.add_section()
    loading, agreed = record["loading"], record["agreement"]
    table.add_row("load, s", *(f"{loading[n]['load_s']:.2f}" for n in names))
    table.add_row("private memory added by loading, MB", *(f"{loading[n]['added'] / 1e6:.0f}" for n in names))
    table.add_row("private memory after a prompt, MB", *(f"{loading[n]['after_prompt']['private'] / 1e6:.0f}" for n in names))
    if first := next((row for title, row in record["results"].items() if title.startswith("decode, batch 1")), None):
        speeds = {n: record["read_bytes"][n] / first[n]["seconds"] for n in names if "seconds" in first[n]}
        shares = [f"{100 * speeds[n] / record['bandwidth']:.0f}" if n in speeds else "-" for n in names]
        table.add_row(f"first row, % of {record['bandwidth'] / 1e9:.1f} GB/s", *shares)
    reference = agreed[names[0]]["reference"]
    table.add_row(f"KL from {reference}", *(f"{agreed[n]['kl']:.1e}" for n in names))
    table.add_row(f"same first choice as {reference}", *(f"{agreed[n]['top1']:.2f}" for n in names))
    table.add_row(f"correlation with {reference}", *(f"{agreed[n]['correlation']:.4f}" for n in names))
    Console().print(table)
    for name, reason in record["reasons"].items():
        Console().print(f"{name}: {reason}")


if __name__ == "__main__":
    typer.run(main)
