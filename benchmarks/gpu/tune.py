"""Times block sizes that a GPU's row of tiles.py could hold: `python -m benchmarks.gpu.tune attention experts [--match TEXT]`.

Candidates come from the cache of kernels or are compiled, in parallel, then timed on the cases that each tile serves, as
gpu-check times them. A
table per tile: microseconds of every case, registers and stack, the best by the sum of ratios first; `*` is today's. Without a
GPU (--compile 90) it compiles and tells the resources.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.gpu import ahead, attention, experts
from benchmarks.gpu.run import Run, timed
from latentrt.plugins.architecture import Gpu, get
from latentrt.plugins.launch.compile import CompiledKernel, compile_kernel
from latentrt.plugins.launch.cuda import CudaLauncher
from latentrt.plugins.mla_attention import plan as attention_plan
from latentrt.plugins.mla_attention.tiles import TILES as ATTENTION
from latentrt.plugins.moe_experts import plan as experts_plan
from latentrt.plugins.moe_experts.tiles import TILES as EXPERTS

WORKERS = 16
PRODUCTS = ("attend_shares", "gate_up", "down")  # the kernels whose resources are told


@dataclass(frozen=True)
class Subject:
    """A tile to tune: its table and name, what else it may be, the cases it is timed on, and its kernels' functions."""

    table: dict
    name: str
    candidates: tuple
    cases: dict[str, Callable[[Run], tuple[str, list, dict]]]  # op, argument sets, attributes

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidates", tuple(dict.fromkeys(self.candidates)))


def variants(tile, **choices) -> tuple:
    """`tile` with every combination of `choices`; itself first."""
    made = [replace(tile, **dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())]
    return tuple(dict.fromkeys((tile, *made)))


def attention_subjects(capability: int) -> Iterator[Subject]:
    """few and many, bfloat16 and packed."""
    row = ATTENTION[capability]

    def decode(heads: int, batch: int, length: int, form: str = "bfloat16") -> Callable[[Run], tuple]:
        return lambda run: ("mla_attention", _decode_sets(run, heads, batch, length, form), _attributes(form))

    few = {"16h 1x4K": decode(16, 1, 4096), "16h 16x4K": decode(16, 16, 4096), "16h 64x4K": decode(16, 64, 4096)}
    many = {"128h 1x16K": decode(128, 1, 16384), "128h 16x4K": decode(128, 16, 4096), "128h 64x4K": decode(128, 64, 4096)}
    yield Subject(ATTENTION[capability], "few", variants(row["few"], block_n=(16, 32, 64), warps=(4, 8), stages=(2, 3, 4)), few)
    blocks = variants(row["many"], block_n=(32, 64), stages=(1, 2, 3), unchain=(0, 1))
    blocks += variants(_half(row["many"]), block_n=(16, 32), warps=(4, 8), stages=(2, 3))
    yield Subject(ATTENTION[capability], "many", blocks, many)
    for form in ("fp8", "int6"):
        cases = {f"16h 1x16K {form}": decode(16, 1, 16384, form), f"16h 64x4K {form}": decode(16, 64, 4096, form)}
        blocks = variants(row["few.packed"], block_n=(16, 32, 64), warps=(4, 8), stages=(1, 2))
        yield Subject(ATTENTION[capability], "few.packed", blocks, cases)
        cases = {f"128h 16x4K {form}": decode(128, 16, 4096, form)}
        blocks = variants(row["many.packed"], block_n=(32, 64), warps=(8, 16), stages=(1, 2), unchain=(0, 1))
        blocks += variants(_half(row["many.packed"]), block_n=(16, 32), warps=(4, 8))
        yield Subject(ATTENTION[capability], "many.packed", blocks, cases)


def _half(tile):
    """Half as many rows, multiplied by warps."""
    return replace(tile, block_m=32, product="f16_sync", unchain=0)


def expert_subjects(capability: int) -> Iterator[Subject]:
    """Few rows of an expert as in decode, and many as in prompts, where weights have 8 or 4 bits."""
    row = EXPERTS[capability]

    def case(model: str, kind: str, tokens: int) -> dict[str, Callable[[Run], tuple]]:
        return {f"{model} {tokens} {kind}": lambda run: _expert_sets(run, model, kind, tokens)}

    def subject(name: str, tile, *cases: dict, **choices) -> Subject:
        return Subject(EXPERTS[capability], name, variants(tile, **choices), {k: v for c in cases for k, v in c.items()})

    def few(kind: str) -> tuple[dict, ...]:
        return case("V2-Lite", kind, 1), case("V2-Lite", kind, 16), case("V2", kind, 1)

    tile = row["few int4"]
    yield subject("few int4", tile, *few("int4"), block_n=(32, 64), down_n=(32, 64), warps=(4, 8), stages=(4, 6))
    tile = row["many int4"]
    many = case("V2-Lite", "int4", 4096)
    yield subject("many int4", tile, many, block_m=(64, 128), block_n=(64, 128), stages=(2, 3), swap=(0, 1))
    tile = row.get("few float8", row["few"])
    yield subject("few float8", tile, *few("FP8"), block_n=(32, 64), down_n=(32, 64), warps=(4, 8), stages=(3, 4))
    tile = row.get("many float8", row["many"])
    many = case("V2-Lite", "FP8", 4096)
    yield subject("many float8", tile, many, block_n=(64, 128), down_n=(128, 256), block_k=(64, 128), stages=(3, 4))


SUBJECTS = {"attention": attention_subjects, "experts": expert_subjects}


def _attributes(form: str) -> dict:
    return dict(softmax_scale=attention.SCALE, cache_format=form)


def _decode_sets(run: Run, heads: int, batch: int, length: int, form: str) -> list[list]:
    from latentrt.plugins import cache_formats

    if run.device.type != "cuda":
        batch, length = 1, 64
    layout = cache_formats.get(form)
    token = layout.encode(run.randn(512), run.randn(64))
    pages = batch * (length // attention.PAGE)
    cache = token.repeat(1 + pages * run.sets(pages * attention.PAGE * token.nbytes), attention.PAGE, 1)
    return attention._input_sets(run, cache, heads, batch, length, 512, 64)


def _expert_sets(run: Run, model: str, kind: str, tokens: int) -> tuple[str, list, dict]:
    count, hidden, inner, top_k, _ = experts.SHAPES[model]
    if run.device.type != "cuda":
        count, tokens = top_k, min(tokens, 2)
    gate_up, gate_up_scale = experts._weights(run, (count, 2 * inner, hidden), kind)
    down, down_scale = experts._weights(run, (count, hidden, inner), kind)
    sets = experts._input_sets(run, tokens, hidden, count, top_k, gate_up[0].nbytes + down[0].nbytes)
    return "moe_experts", [[*s, gate_up, down, gate_up_scale, down_scale] for s in sets], experts._attributes(gate_up)


@contextmanager
def chosen(subject: Subject, tile) -> Iterator[None]:
    """Plans take `tile` meanwhile."""
    kept = subject.table.get(subject.name)
    subject.table[subject.name] = tile
    try:
        yield
    finally:
        subject.table[subject.name] = kept
        if kept is None:
            del subject.table[subject.name]


def programs_held(kernel: CompiledKernel, warps: int) -> int:
    """How many programs a multiprocessor holds."""
    registers = -(-kernel.metadata["registers"] // 8) * 8 * 32 * warps
    shared = get(kernel.metadata["architecture"]).shared_bytes
    return max(1, min((shared + 1024) // (kernel.metadata["shared_bytes"] + 1024), 65536 // registers))


class Tuner:
    """Compiles and times; `folder` keeps cubins."""

    def __init__(self, run: Run, target: Gpu, folder: Path, seconds: float):
        self.run, self.target, self.folder, self.end = run, target, folder, time.monotonic() + seconds
        self.launcher = CudaLauncher(target, {}) if run.device.type == "cuda" else None
        self.rows: list[dict] = []

    def specs(self, subject: Subject, tile, sets: tuple) -> list:
        op, arguments, attributes = sets
        plan = _plan_function(op)
        with chosen(subject, tile):
            plan.cache_clear()
            found = [k for s in arguments[:1] for k in ahead_plan(op, s, attributes, self.target).kernels]
            plan.cache_clear()
        return list(dict.fromkeys(found))

    def compile(self, wanted: list) -> dict:
        """Kernels by spec; an error's last line where one cannot be compiled."""
        with ProcessPoolExecutor(WORKERS if self.launcher else 2, get_context("spawn")) as pool:
            found = pool.map(_compiled, wanted, itertools.repeat(self.target.capability), itertools.repeat(self.folder))
            return dict(zip(wanted, found, strict=True))

    def tune(self, subject: Subject) -> None:
        cases = {name: make(self.run) for name, make in subject.cases.items()}
        wanted = {tile: {n: self.specs(subject, tile, sets) for n, sets in cases.items()} for tile in subject.candidates}
        every = list(dict.fromkeys(s for by_case in wanted.values() for specs in by_case.values() for s in specs))
        start = time.monotonic()
        kernels = self.compile(every)
        print(f"{subject.name}: {len(every)} kernels compiled in {time.monotonic() - start:.0f} s", flush=True)
        rows = []
        for tile, by_case in wanted.items():
            specs = [s for specs in by_case.values() for s in specs]
            broken = [kernels[s] for s in specs if isinstance(kernels[s], str)]
            mine = [kernels[s] for s in specs if s.function in PRODUCTS and not isinstance(kernels[s], str)]
            row = dict(tile=tile, times={}, why=broken[0] if broken else "")
            row["registers"] = max((k.metadata["registers"] for k in mine), default=0)
            row["stack"] = max((k.metadata["stack_bytes"] for k in mine), default=0)
            if not broken and hasattr(tile, "ctas"):
                tile = replace(tile, ctas=min(programs_held(k, tile.warps) for k in mine))
                row["ctas"] = tile.ctas
            for name, sets in cases.items():
                if self.launcher and not broken and time.monotonic() < self.end:
                    row["times"][name] = self._time(subject, tile, sets, kernels)
            rows.append(row)
        self._print(subject, rows)

    def _time(self, subject: Subject, tile, sets: tuple, kernels: dict) -> float:
        op, arguments, attributes = sets
        from benchmarks.gpu.launch import outputs_and_plan

        with chosen(subject, tile):
            _plan_function(op).cache_clear()
            made = [outputs_and_plan(op, tensors, attributes, self.target) for tensors in arguments]
            _plan_function(op).cache_clear()
        specs = list(dict.fromkeys(spec for _, _, plan in made for spec in plan.kernels))
        self.launcher.kernels.update({s: kernels[s] for s in specs})
        try:
            self.launcher.prepare(specs)
            return timed(self.run, {"x": ahead._launches(self.launcher, made)}, len(made), rounds=7)["x"] * 1e6
        except Exception as error:
            print(f"  {tile}: {type(error).__name__}: {str(error)[:120]}")
            return float("inf")

    def _print(self, subject: Subject, rows: list[dict]) -> None:
        cases, today = list(subject.cases), rows[0]["times"]

        def cost(row: dict) -> float:
            if len(row["times"]) < len(cases):
                return float("inf")
            return sum(row["times"][c] / today[c] for c in cases) / len(cases)

        ordered = sorted(rows, key=cost)
        self.rows += [
            {**r, "tile": str(r["tile"]), "name": subject.name, "cost": cost(r), "cases": cases} for r in ordered
        ]
        for row in ordered[:6] + [r for r in (rows[0],) if r not in ordered[:6]]:
            fields = {k: v for k, v in vars(row["tile"]).items() if k != "spills_because"}
            words = " ".join(f"{k}={v}" for k, v in fields.items())
            times = " ".join(f"{c}: {row['times'].get(c, float('nan')):.1f}" for c in cases)
            mark = "*" if row is rows[0] else " "
            resources = f"held={row.get('ctas', '')} regs={row['registers']} stack={row['stack']}"
            print(f" {mark} {cost(row):.3f} | {times} | {words} {resources} {row['why']}")


def _compiled(spec, capability: int, folder: Path) -> CompiledKernel | str:
    try:
        return ahead.find(spec, capability) or compile_kernel(spec, capability, folder)
    except Exception as error:  # a candidate that does not fit
        return str(error).strip().splitlines()[-1][-80:]


def _plan_function(op: str):
    return attention_plan.plan if op == "mla_attention" else experts_plan.plan


def ahead_plan(op: str, tensors: list, attributes: dict, target: Gpu):
    """The plan of one call."""
    from benchmarks.gpu.launch import _plan
    from latentrt.plugins import ops

    return _plan(ops.part(op, "trt").OP, tensors, attributes, target)[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subjects", nargs="+", choices=list(SUBJECTS))
    parser.add_argument("--match", default="", help="tiles whose name or cases hold this text")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--compile", type=int, help="compile for this capability, without a GPU")
    parser.add_argument("--out", type=Path, default=Path("/tmp/tune"))
    options = parser.parse_args()
    device = torch.device("cpu" if options.compile else "cuda")
    run = Run(device, options.compile is not None)
    if options.compile:
        target = Gpu.of(options.compile)
    else:
        properties = torch.cuda.get_device_properties(device)
        target = Gpu.of(properties.major * 10 + properties.minor, properties.multi_processor_count)
    options.out.mkdir(parents=True, exist_ok=True)
    tuner = Tuner(run, target, options.out, options.seconds)
    for name in options.subjects:
        for subject in SUBJECTS[name](target.capability):
            if options.match in f"{subject.name} {' '.join(subject.cases)}" and time.monotonic() < tuner.end:
                tuner.tune(subject)
                (options.out / "tune.json").write_text(json.dumps(tuner.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
