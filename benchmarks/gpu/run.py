"""What sections share: checks, measurements and skips; timing; the card's two ceilings."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch

HBM, BF16_FLOPS = 4.8e12, 990e12  # H200: bytes/s and FLOP/s of its datasheet, for the roofline
WARM_UP, ROUNDS = 3, 15


@dataclass
class Run:
    """One run of the whole: where, and what was found. `deadline` is the current section's, in time.monotonic()."""

    device: torch.device
    dry: bool
    section: str = ""
    deadline: float = 0.0
    checks: list[dict] = field(default_factory=list)
    measurements: list[dict] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)  # "copy" bytes/s, "matmul" FLOP/s, measured

    def check(self, name: str, error: float, limit: float, note: str = "") -> None:
        """Passed if error <= limit; NaN never passes."""
        passed = bool(error <= limit)
        self.checks.append(
            dict(section=self.section, name=name, passed=passed, error=float(error), limit=limit, note=note)
        )
        print(f"  {'ok  ' if passed else 'FAIL'} {name}: {error:.3g} (limit {limit:g}) {note}", flush=True)

    def measure(self, name: str, **values) -> None:
        """One row: values by name, seconds and shares as they are."""
        self.measurements.append(dict(section=self.section, name=name, **values))
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"  {name}: {shown}", flush=True)

    def skip(self, name: str, why: object) -> None:
        """Something that is not there, or did not fit into the time."""
        self.skipped.append(dict(section=self.section, name=name, why=str(why).strip()[:300]))
        print(f"  skip {name}: {self.skipped[-1]['why']}", flush=True)

    def late(self, name: str) -> bool:
        """Whether the section's time is spent; notes what is left out."""
        if time.monotonic() < self.deadline:
            return False
        self.skip(name, "the section's time is spent")
        return True

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
        """Normal values made on the device in `dtype`, without a wider copy."""
        return torch.empty(shape, dtype=dtype, device=self.device).normal_(0, scale)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected| over all elements, in float64."""
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def timed(run: Run, candidates: dict[str, Callable[[], object]], calls: int = 1, rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of one of the `calls` that each candidate makes, candidates in turn within every round.

    On a GPU a candidate is captured into a CUDA graph, so that launches cost nothing, or run as it is where it cannot be.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    ready = {name: _prepared(run, call) for name, call in candidates.items()}
    for _ in range(1 if run.dry else rounds):
        for name, call in ready.items():
            seconds[name].append(_once(run, call) / calls)
    return {name: median(values) for name, values in seconds.items()}


def _prepared(run: Run, call: Callable) -> Callable:
    if run.device.type != "cuda":
        call()
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except Exception:  # a baseline may synchronize or allocate
        torch.cuda.synchronize()
        return call
    graph.replay()
    return graph.replay


def _once(run: Run, call: Callable) -> float:
    if run.device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def ceilings(run: Run) -> None:
    """Copy bandwidth (read plus written) and the rate of a bf16 product, on random data."""
    size, n = (1 << 12, 64) if run.dry else (1 << 31, 8192)
    source = run.randn(size)
    target = torch.empty_like(source)
    a, b = run.randn(n, n), run.randn(n, n)
    found = timed(run, {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b})
    run.ceilings = {"copy": 2 * source.nbytes / found["copy"], "matmul": 2 * n**3 / found["matmul"]}
    run.measure(
        "ceilings", copy_GBps=run.ceilings["copy"] / 1e9, matmul_TFLOPS=run.ceilings["matmul"] / 1e12,
        copy_of_datasheet=run.ceilings["copy"] / HBM,
    )  # fmt: skip
