"""Times block sizes of the FP8 linears on the products of V2-Lite and V2: what `float8_tiles.py` is filled from.

    python benchmarks/gpu/tune_linear.py [--rows 1 16 ...] [--seconds 50] [--jobs N] [--dry-run]

Every candidate is compiled first, in processes side by side, and compared with float32. Times are of CUDA graphs over weights
that are not in the L2. A line per product and number of rows: the best candidate, its microseconds and GB/s of weights; those
of the block sizes in use, and of torch._scaled_mm. Then products head by head and the router's, beside a library's
(`few_rows.py`). At the end, the candidates whose sum over a model's products is least.
--dry-run tries the script itself on a CPU, tiny, in Triton's interpreter.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROWS = (1, 16, 64, 32, 8, 2, 4)  # what time is left for comes last
LIMIT = 8e-3  # relative error: rounded to bfloat16, sums in another order
ROUNDS = 5
SMALLEST = 1e-10
LATER = 5.0  # seconds more that other products may take
SCALED_MM, QUANTIZED = "_scaled_mm", "quantize, then "
BEST = 4  # candidates at 16 rows that are tried at fewer


@dataclass(frozen=True)
class Product:
    """x [T, k] times weight [n, k] transposed; quantizes: x comes as bfloat16."""

    model: str
    name: str
    k: int
    n: int
    quantizes: bool = False


PRODUCTS = (
    Product("V2-Lite", "q + kv_a", 2048, 3648),
    Product("V2-Lite", "o", 2048, 2048, True),
    Product("V2-Lite", "gate_up", 2048, 5632),
    Product("V2-Lite", "down", 2816, 2048),
    Product("V2", "q_a + kv_a", 5120, 2112),
    Product("V2", "q_b", 1536, 24576),
    Product("V2", "o", 16384, 5120, True),
    Product("V2", "gate_up", 5120, 6144),
    Product("V2", "down", 3072, 5120),
)
TINY = (Product("tiny", "o", 160, 48, True), Product("tiny", "down", 96, 80))


def candidates(rows: int, wide_mma: bool, dry: bool) -> dict[str, object]:
    """Block sizes by the name they are printed with."""
    from latentrt.runtime.backends.torch.float8_tiles import RowTile, Tile

    if rows == 1:
        sizes = [(1, 1024, 2), (2, 512, 2), (2, 1024, 4), (2, 2048, 4), (4, 512, 2), (4, 512, 4), (4, 1024, 4), (4, 2048, 4),
                 (4, 2048, 8), (8, 512, 4), (8, 512, 8), (8, 1024, 4), (8, 2048, 8), (16, 512, 8)]  # fmt: skip
        found = [RowTile(*s) for s in sizes[:: 5 if dry else 1]]
    else:
        block_m = next(m for m in (16, 32, 64) if rows <= m)
        # n, k, warps, stages, swap: with the least programs per multiprocessor
        swapped = [(64, 128, 4, 4, 1), (64, 128, 4, 6, 1), (64, 256, 4, 3, 1), (128, 128, 4, 4, 1)]
        plain = [(16, 256, 1, 4, 0), (32, 128, 2, 6, 0), (32, 256, 2, 4, 0), (32, 256, 4, 3, 0)]
        if block_m > 16:
            plain = [(32, 128, 4, 4, 0), (64, 128, 4, 3, 0)]
        shapes = [(s, p) for s in swapped * wide_mma + plain for p in (0, 1, 2, 3, 4)]
        shapes = [(s, p) for s, p in shapes if not (p == 0 and s[4]) and (p < 3 or s[0] > 16)]
        found = [Tile(block_m, n, k, p, w, s, swap) for (n, k, w, s, swap), p in (shapes[::9] if dry else shapes)]
    return {_name(tile): tile for tile in found}


def _name(tile) -> str:
    return f"{type(tile).__name__}{tuple(vars(tile).values())}"


class Case:
    """One product at one number of rows: its inputs, several weights, and what each candidate runs."""

    def __init__(self, run, product: Product, rows: int, sets: int | None = None):
        import torch

        from latentrt.runtime.backends.torch import float8_kernels, kernels

        self.run, self.product, self.rows = run, product, rows
        self.sets = sets or run.sets(product.k * product.n)
        self.x = run.randn(rows, product.k)
        self.q, self.row = kernels.quantize_rows(self.x, SMALLEST)
        first = run.randn(product.n, product.k).to(torch.float8_e4m3fn).view(torch.uint8)
        self.weights = [first.clone().view(torch.float8_e4m3fn) for _ in range(self.sets)]
        self.channel = torch.rand(product.n, device=run.device) + 0.5
        self.arrived = float8_kernels.counters(self.weights[0])
        self.expected = (self.q.float() @ self.weights[0].float().t()) * self.row * self.channel

    def calls(self, tile: object) -> dict[str, Callable]:
        """(weight) -> y by name: of quantized rows, and where these come as bfloat16, both ways."""
        from latentrt.runtime.backends.torch import float8_kernels, kernels

        def quantized(weight):
            return float8_kernels.multiply(self.q, self.row, weight, self.channel, self.arrived, tile)

        def after(weight):
            q, row = kernels.quantize_rows(self.x, SMALLEST)
            return float8_kernels.multiply(q, row, weight, self.channel, self.arrived, tile)

        def alone(weight):
            return float8_kernels.linear(self.x, weight, self.channel, SMALLEST, None, tile)

        name = _name(tile)
        if not self.product.quantizes:
            return {name: quantized}
        return {QUANTIZED + name: after} | ({name: alone} if self.rows == 1 else {})

    def scaled_mm(self, weight):
        import torch

        from latentrt.runtime.backends.torch import kernels

        q, row = kernels.quantize_rows(self.x, SMALLEST) if self.product.quantizes else (self.q, self.row)
        return torch._scaled_mm(q, weight.t(), scale_a=row, scale_b=self.channel[None, :], out_dtype=torch.bfloat16)

    def right(self, name: str, call: Callable) -> bool:
        """Whether a candidate runs twice and is right; says so if not."""
        from benchmarks.gpu.run import relative_error

        try:
            error = max(relative_error(call(self.weights[0]), self.expected) for _ in range(2))
            error = error if not self.arrived.any() else float("inf")
        except Exception as problem:  # too much shared memory, or torch has no such product
            print(f"  {name}: {type(problem).__name__}: {str(problem).strip()[:120]}", flush=True)
            return False
        if not error <= LIMIT:
            print(f"  {name}: WRONG by {error:.3g} at {self.rows} x {self.product.k} x {self.product.n}", flush=True)
            self.arrived.zero_()
        return error <= LIMIT

    def measure(self, tiles: dict[str, object]) -> dict[str, float]:
        """Seconds by name of those that are right."""
        from benchmarks.gpu.run import timed

        calls = {name: call for tile in tiles.values() for name, call in self.calls(tile).items()}
        if self.run.device.type == "cuda":
            calls[SCALED_MM] = self.scaled_mm
        calls = {name: call for name, call in calls.items() if self.right(name, call)}
        over = {name: (lambda call=call: [call(w) for w in self.weights][-1]) for name, call in calls.items()}
        return timed(self.run, over, self.sets, ROUNDS)


def used(capability: int, rows: int, product: Product) -> object:
    """The block sizes in use."""
    from latentrt.runtime.backends.torch import float8_tiles as tiles

    if rows > 1:
        return tiles.tile_of(capability, rows)
    return (tiles.QUANTIZING_ROW_TILES if product.quantizes else tiles.ROW_TILES)[capability]


def compile_one(job: tuple[Product, int, object]) -> None:
    """In a process of its own: leaves the kernel in Triton's cache. What fails shows when it is measured."""
    import contextlib

    import torch

    from benchmarks.gpu.run import Run

    product, rows, tile = job
    with contextlib.suppress(Exception):
        case = Case(Run(torch.device("cuda"), False), product, rows, 1)
        for call in case.calls(tile).values():
            call(case.weights[0])
        torch.cuda.synchronize()


def compile_all(rows: list[int], wide_mma: bool, gpu, jobs: int) -> None:
    """Every kernel once: of one row they differ by k, tiles by whether their sum is shared."""
    work = {}
    for count in rows:
        tiles = candidates(count, wide_mma, False).values()
        for product, tile in ((p, t) for p in PRODUCTS for t in (*tiles, used(gpu.capability, count, p))):
            work.setdefault(_kernel(product, count, tile, gpu.num_sms), (product, count, tile))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        try:
            list(pool.map(compile_one, work.values()))
        except BrokenProcessPool as error:  # what is missing is compiled when it is measured
            print(f"a process that compiled ended: {error}", flush=True)


def _kernel(product: Product, rows: int, tile: object, num_sms: int) -> tuple:
    """The same for what is the same kernel."""
    from latentrt.runtime.backends.torch.float8_kernels import parts

    if rows == 1:
        return tile, product.k, product.quantizes
    tiles = -(-product.n // tile.block_n) * -(-rows // tile.block_m)
    return replace(tile, programs=0), parts(product.k, tile, tiles, num_sms)[1] > 1


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 2 where there is no GPU."""
    options, started = _options(arguments), time.monotonic()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(ROOT))
    import torch

    from benchmarks.gpu import few_rows
    from benchmarks.gpu.run import Run
    from latentrt.plugins.launch.torch import target_of

    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA GPU is visible to PyTorch; --dry-run tries the script itself on the CPU", file=sys.stderr)
        return 2
    run = Run(torch.device("cpu" if options.dry_run else "cuda"), options.dry_run)
    gpu = target_of(torch.empty(0, device=run.device))
    wide_mma = gpu.capability // 10 in (9, 10)
    if not run.dry:
        print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}", flush=True)
        compile_all(options.rows, wide_mma, gpu, options.jobs)
        print(f"compiled after {time.monotonic() - started:.0f} s", flush=True)
    found: dict[tuple[Product, int], dict[str, float]] = {}
    for rows in options.rows:
        for product in TINY if run.dry else PRODUCTS:
            if time.monotonic() - started > options.seconds:
                print(f"not measured, {options.seconds} s are spent: {product.model} {product.name}, {rows} rows")
                continue
            tiles = _tried(found.get((product, 16)), candidates(rows, wide_mma, run.dry), rows)
            now = used(gpu.capability, rows, product)
            seconds = found[product, rows] = Case(run, product, rows).measure(tiles | {_name(now): now})
            print(_line(product, rows, seconds, _name(now)), flush=True)
    for rows in sorted(options.rows):
        if time.monotonic() - started <= options.seconds + LATER:
            print("\n".join(few_rows.measure(run, rows)), flush=True)
    for line in _sums(found):
        print(line)
    print(f"{time.monotonic() - started:.0f} s")
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tune_linear", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="numbers of rows, 1 to 64, in this order")
    parser.add_argument("--seconds", type=float, default=50.0, help="what is not begun by then is left out")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes that compile")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, to try the script itself")
    return parser.parse_args(arguments)


def _tried(at_16: dict[str, float] | None, tiles: dict[str, object], rows: int) -> dict[str, object]:
    """All, or of fewer rows than 16 what was best there."""
    if not at_16 or not 1 < rows < 16:
        return tiles
    best = [name.removeprefix(QUANTIZED) for name in sorted(at_16, key=at_16.get) if name != SCALED_MM][:BEST]
    return {name: tiles[name] for name in best if name in tiles}


def _line(product: Product, rows: int, seconds: dict[str, float], now: str) -> str:
    own = {name: s for name, s in seconds.items() if name != SCALED_MM}
    if not own:
        return f"{product.model:8}{product.name:11}{rows:3} rows  nothing ran"
    best = min(own, key=own.get)
    current = own.get(now, own.get(QUANTIZED + now, float("nan")))
    rate, others = product.k * product.n / own[best] / 1e9, (current, seconds.get(SCALED_MM, float("nan")))
    times = f"{own[best] * 1e6:7.2f} us {rate:5.0f} GB/s, now {others[0] * 1e6:7.2f} us, {SCALED_MM} {others[1] * 1e6:7.2f} us"
    return f"{product.model:8}{product.name:11}{rows:3} rows {times}  {best}"


def _sums(found: dict[tuple[Product, int], dict[str, float]]) -> list[str]:
    """Per model and rows, the candidates with the least sum over all products, and torch's; a quantizing one its better way."""
    lines = []
    for model, rows in dict.fromkeys((product.model, rows) for product, rows in found):
        all_products = []
        for seconds in (s for (product, r), s in found.items() if (product.model, r) == (model, rows)):
            merged: dict[str, float] = {}
            for name, s in seconds.items():
                name = name.removeprefix(QUANTIZED)
                merged[name] = min(s, merged.get(name, s))
            all_products.append(merged)
        common = set.intersection(*map(set, all_products))
        sums = {name: sum(m[name] for m in all_products) * 1e6 for name in common}
        best = sorted(sums, key=sums.get)[:3]
        best += [SCALED_MM] if SCALED_MM in sums and SCALED_MM not in best else []
        lines.append(f"{model}, {rows} rows, all products: " + "; ".join(f"{name} {sums[name]:.1f} us" for name in best))
    return lines


if __name__ == "__main__":
    sys.exit(main())
