"""What sections share: checks, measurements and skips; timing; the card's two ceilings."""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benchmarks.gpu.state import State

BF16_FLOPS = 990e12  # FLOP/s of an H100's or H200's datasheet, for the roofline
WARM_UP, ROUNDS = 3, 15
SLEEP = 2_000_000  # cycles, about 1 ms, in which the host launches what is timed
SHORTEST, MOST_CALLS = 5e-4, 20  # seconds that a captured graph should take; calls put into it for that, at most
BASELINES = ("torch_sdpa", "flash_mla", "flashinfer", "grouped_mm")  # may refuse to be captured
REREAD = 4  # times the L2 that is read before the same bytes are read again
MOST_SETS = 256
_SAVE_SECONDS = 1.0


class Run:
    """One run of the whole: where, and what was found. Saved into `file`, if there is one, as it grows."""

    def __init__(self, device: torch.device, dry: bool, file: Path | None = None):
        self.device, self.dry, self.file = device, dry, file
        self.state, self._saved = State.read(file) if file else State(), 0.0
        self._parent = os.getppid()

    @property
    def skipped(self) -> list[dict]:
        return self.state.skipped

    @property
    def ceilings(self) -> dict[str, float]:
        """"copy" bytes/s and "matmul" FLOP/s; NaN where they could not be measured."""
        return {"copy": math.nan, "matmul": math.nan} | self.state.ceilings

    def check(self, name: str, error: float, limit: float, note: str = "") -> None:
        """Passed if error <= limit; NaN never passes."""
        self.state.check(name, error, limit, note)
        self.save(_SAVE_SECONDS)

    def measure(self, name: str, **values) -> None:
        """One row: values by name, seconds and shares as they are."""
        self.state.measurements.append(dict(section=self.state.section, name=name, **values))
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"  {name}: {shown}", flush=True)
        self.save(_SAVE_SECONDS)

    def skip(self, name: str, why: object) -> None:
        """Something that is not there, or did not fit into the time."""
        self.skipped.append(dict(section=self.state.section, name=name, why=str(why).strip()[:300]))
        print(f"  skip {name}: {self.skipped[-1]['why']}", flush=True)

    def skip_once(self, name: str, why: object) -> None:
        """The same in one section is said once."""
        if not any(s["name"] == name and s["section"] == self.state.section for s in self.skipped):
            self.skip(name, why)

    def late(self, name: str) -> bool:
        """Whether the section's time is spent; notes what is left out."""
        if time.monotonic() < self.state.deadline:
            return False
        self.skip(name, "the section's time is spent")
        return True

    def save(self, after: float = 0.0) -> None:
        """Writes the state unless that was done less than `after` seconds ago. Ends if whoever reads it is gone."""
        if self.file is None or time.monotonic() - self._saved < after:
            return
        if os.getppid() != self._parent:
            os._exit(1)
        self.state.write(self.file)
        self._saved = time.monotonic()

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
        """Normal values made on the device in `dtype`, without a wider copy."""
        return torch.empty(shape, dtype=dtype, device=self.device).normal_(0, scale)

    @property
    def bandwidth(self) -> float:
        """Bytes/s of this GPU's memory, by its clock and width: 3.35e12 of an H100, 4.8e12 of an H200. NaN without a GPU."""
        if self.device.type != "cuda":
            return math.nan
        properties = torch.cuda.get_device_properties(self.device)
        return 2 * properties.memory_clock_rate * 1e3 * properties.memory_bus_width / 8

    def free_bytes(self) -> int:
        """Memory of the device that nothing uses."""
        if self.device.type != "cuda":
            return 1 << 30
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def sets(self, read: int) -> int:
        """How many input sets of `read` bytes a graph goes through so that none is still in the L2 when its turn comes."""
        if self.device.type != "cuda":
            return 2
        l2 = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 128 << 20)
        return max(1, min(MOST_SETS, -(-REREAD * l2 // read)))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected| over all elements, in float64."""
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def timed(
    run: Run, candidates: dict[str, Callable[[], object]], calls: int = 1, rounds: int = ROUNDS, capture: bool = True
) -> dict[str, float]:
    """Median seconds of one of the `calls` that each candidate makes, candidates in turn within every round.

    On a GPU a candidate is captured into a CUDA graph, several times over where it is short, and launched while the GPU
    still sleeps, so that launching is no part of the time. Where that fails it runs as it is and this is noted: for a
    baseline as a skip, for what is ours as a failed check. capture=False: the candidates replay graphs of their own.
    """
    ready = {name: _prepared(run, name, call, capture) for name, call in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(1 if run.dry else rounds):
        for name, (call, times) in ready.items():
            seconds[name].append(_once(run, call) / (times * calls))
    return {name: median(values) for name, values in seconds.items()}


def _prepared(run: Run, name: str, call: Callable, capture: bool) -> tuple[Callable, int]:
    """What to launch, and how many times over it makes the candidate's calls."""
    if run.device.type != "cuda":
        call()
        return call, 1
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.synchronize()
    if not capture:
        return call, 1
    try:
        graph = _captured(call, 1)
        times = min(MOST_CALLS, math.ceil(SHORTEST / max(_once(run, graph.replay), 1e-7)))
        return (_captured(call, times) if times > 1 else graph).replay, times
    except Exception as error:  # it synchronizes, or allocates outside of torch
        torch.cuda.synchronize()
        _not_captured(run, name, f"{type(error).__name__}: {error}"[:200])
        return call, 1


def _captured(call: Callable, times: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):  # a failed one leaves its stream current
        for _ in range(times):
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _not_captured(run: Run, name: str, why: str) -> None:
    if name in BASELINES:
        run.skip_once(f"CUDA graph of {name}", f"timed with its launches from the host: {why}")
    else:
        run.check(f"CUDA graph of {name}", math.nan, 0, f"timed with its launches from the host: {why}")


def _once(run: Run, call: Callable) -> float:
    if run.device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(SLEEP)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def ceilings(run: Run) -> None:
    """Copy bandwidth (read plus written) and the rate of a bf16 product, on random data."""
    size, n = (1 << 12, 64) if run.dry else (min(1 << 31, run.free_bytes() // 8), 8192)
    source = run.randn(size)
    target = torch.empty_like(source)
    a, b = run.randn(n, n), run.randn(n, n)
    found = timed(run, {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b})
    run.state.ceilings = {"copy": 2 * source.nbytes / found["copy"], "matmul": 2 * n**3 / found["matmul"]}
    run.measure(
        "ceilings", copy_GBps=run.ceilings["copy"] / 1e9, matmul_TFLOPS=run.ceilings["matmul"] / 1e12,
        copy_of_datasheet=run.ceilings["copy"] / run.bandwidth,
    )  # fmt: skip
