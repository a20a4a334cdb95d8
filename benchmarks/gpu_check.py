"""Checks and measures everything that needs a GPU, in one command of under ten minutes: `make gpu-check`.

    python benchmarks/gpu_check.py [--section NAME ...] [--dry-run] [--out FOLDER] [--minutes 9]

Runs every kernel against float64 references on the shapes of DeepSeek-V2 and V2-Lite, the plugins' launches through the
driver, the torch backend and TensorRT engines end to end, then measures. What is not installed is skipped by name. Writes
<GPU>-<date>-<time>.json and .md into FOLDER as it goes; the exit status is 1 if a check failed or a section broke or did not
end, 2 if there is no GPU. --dry-run runs all it can on tiny shapes on the CPU, kernels in Triton's interpreter.
"""

import argparse
import importlib
import math
import os
import signal
import sys
import tempfile
import time
import traceback
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MINUTES = 9.0
OURS = ("build", "benchmarks", "examples", "export", "plugins", "runtime", "validation")
# name: (function, seconds at most, seconds of MINUTES that earlier sections leave it)
SECTIONS = {
    "ceilings": ("run:ceilings", 20, 5),
    "attention": ("attention:check", 120, 60),
    "narrow": ("narrow:check", 110, 0),
    "routing": ("experts:check_route", 30, 10),
    "experts": ("experts:check_experts", 90, 50),
    "fused": ("fused:check", 30, 10),
    "sampling": ("sampling:check", 30, 5),
    "launch": ("launch:check", 120, 60),
    "probe": ("probe:probe", 60, 15),
    "example": ("model:check", 90, 45),
    "engines": ("engines:check", 150, 60),
    "measure-attention": ("attention:measure", 140, 75),
    "measure-experts": ("experts:measure", 90, 50),
    "measure-model": ("model_speed:measure", 180, 90),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 if every check passed."""
    options = _options(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(ROOT))
    from benchmarks.gpu import report
    from benchmarks.gpu.state import State
    from benchmarks.gpu.watch import watch

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chosen = set(options.section or SECTIONS)
    chosen |= {"ceilings"} if any(name.startswith("measure") for name in chosen) else set()
    names, started = [n for n in SECTIONS if n in chosen], time.monotonic()
    date = datetime.now(UTC).isoformat(timespec="seconds")

    def write(state: State) -> tuple[dict, Path | None]:
        found = report.result(state, names, options.dry_run, date, time.monotonic() - started)
        return found, report.write(found, options.out) if state.gpu else None

    with tempfile.TemporaryDirectory() as folder:
        file, ended = Path(folder) / "state.json", False
        try:
            if watch(names, lambda left: _sections(left, options, started, file), file, write):
                return 2
            ended = True
        finally:
            found, path = write(State.read(file))
            stopped = "" if ended else ", stopped before the end"
            if path:
                print(f"{found['checks']} checks, {len(found['failed'])} failed, {found['total_seconds']} s{stopped} -> {path}")
    return 1 if found["failed"] else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--section", action="append", choices=list(SECTIONS), help="run this one; may be given several times")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, to try the script itself")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for all sections together")
    return parser.parse_args(arguments)


def _sections(left: list[str], options: argparse.Namespace, started: float, file: Path) -> int:
    """Runs sections in turn, in a process of their own; returns its exit status."""
    import torch

    from benchmarks.gpu.run import Run
    from benchmarks.gpu.watch import AFRESH, NO_GPU

    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA GPU is visible to PyTorch; --dry-run tries the script itself on the CPU", file=sys.stderr)
        return NO_GPU
    run = Run(torch.device("cpu" if options.dry_run else "cuda"), options.dry_run, file)
    run.state.gpu = "none (dry run)" if run.dry else torch.cuda.get_device_name()
    for name in left:
        whole = _section(run, name, deadline(left, name, started + options.minutes * 60, options.minutes))
        if not (_usable(run, name) and whole):  # what broke may have left a capture open
            return AFRESH
    return 0


def deadline(names: list[str], name: str, end: float, minutes: float) -> float:
    """When section `name` has to stop: after its seconds at most, and early enough for what is kept for later ones."""
    _, most, _ = SECTIONS[name]
    later = sum(SECTIONS[n][2] for n in names[names.index(name) + 1 :]) * minutes / MINUTES
    return min(time.monotonic() + most, end - later)


def _section(run, name: str, until: float) -> bool:
    """Runs one section within its time; a missing package skips it, any other error fails it: False."""
    start, state, whole = time.monotonic(), run.state, True
    state.section, state.deadline = name, until
    run.save()
    print(f"{name} (Triton {version('triton')}):", flush=True)
    if not run.late(name):
        module, function = SECTIONS[name][0].split(":")
        try:
            getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(run)
        except Exception as error:  # the other sections go on
            if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] not in OURS:
                run.skip(name, f"{error.name} is not installed")
            else:
                traceback.print_exc()
                whole = False
                run.check(f"{name} ran to its end", math.nan, 0, f"{type(error).__name__}: {error}"[:300])
    state.seconds[name] = round(time.monotonic() - start, 1)
    run.save()
    return whole


def _usable(run, name: str) -> bool:
    """Whether this process can go on: after an illegal access every call on the GPU fails."""
    import gc

    import torch

    gc.collect()
    if run.device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return True
    except Exception as error:
        run.check(f"{name} leaves the GPU usable", math.nan, 0, f"{type(error).__name__}: {error}"[:300])
        run.save()
        return False


if __name__ == "__main__":
    sys.exit(main())
