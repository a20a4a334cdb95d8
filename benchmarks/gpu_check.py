"""Checks and measures everything that needs a GPU, in one command of under ten minutes: `make gpu-check`.

    python benchmarks/gpu_check.py [--section NAME ...] [--dry-run] [--out FOLDER] [--minutes 9]

Runs every kernel against float64 references on the shapes of DeepSeek-V2 and V2-Lite, the plugins' launches through the
driver, the torch backend and TensorRT engines end to end, then measures. What is not installed is skipped by name. Writes
<GPU>-<date>.json and .md into FOLDER; the exit status is 1 if a check failed or a section broke. --dry-run runs all it can on
tiny shapes on the CPU, kernels in Triton's interpreter.
"""

import argparse
import importlib
import json
import os
import platform
import sys
import time
import traceback
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "cuda-bindings", "onnx", "pydantic", "transformers", "tensorrt-rtx-cu13", "tensorrt-cu13",
            "flash-mla", "sgl-flash-mla", "flashinfer-python")  # fmt: skip
# name: (function, seconds at most, share of what is left of the whole)
SECTIONS = {
    "ceilings": ("run:ceilings", 20),
    "attention": ("attention:check", 90),
    "routing": ("experts:check_route", 30),
    "experts": ("experts:check_experts", 60),
    "fused": ("experts:check_fused", 30),
    "launch": ("launch:check", 90),
    "probe": ("probe:probe", 60),
    "example": ("model:check", 90),
    "engines": ("engines:check", 150),
    "measure-attention": ("attention:measure", 130),
    "measure-experts": ("experts:measure", 60),
    "measure-model": ("model_speed:measure", 150),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 if every check passed."""
    options = _options(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(ROOT))
    import torch

    from benchmarks.gpu.run import Run, ceilings

    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA GPU is visible to PyTorch; --dry-run tries the script itself on the CPU", file=sys.stderr)
        return 2
    run = Run(torch.device("cpu" if options.dry_run else "cuda"), options.dry_run)
    started, end = time.monotonic(), time.monotonic() + options.minutes * 60
    chosen = options.section or list(SECTIONS)
    if "ceilings" not in chosen and any(name.startswith("measure") for name in chosen):
        run.section = "ceilings"
        ceilings(run)
    durations = {name: _section(run, name, end) for name in SECTIONS if name in chosen}
    result = _result(run, torch, options, durations, time.monotonic() - started)
    _write(result, options.out)
    return 1 if result["failed"] else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--section", action="append", choices=list(SECTIONS), help="run this one; may be given several times")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, to try the script itself")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all sections together")
    return parser.parse_args(arguments)


def _section(run, name: str, end: float) -> float:
    """Runs one section within its time; a missing package skips it, any other error fails it. Returns its seconds."""
    target, seconds = SECTIONS[name]
    start = time.monotonic()
    run.section, run.deadline = name, min(start + seconds, end)
    print(f"{name}:", flush=True)
    if run.late(name):
        return 0.0
    module, function = target.split(":")
    try:
        getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(run)
    except ModuleNotFoundError as error:
        run.skip(name, f"{error.name} is not installed")
    except Exception as error:  # the other sections go on
        traceback.print_exc()
        run.check(f"{name} ran to its end", float("nan"), 0, f"{type(error).__name__}: {error}"[:300])
    _free(run)
    return time.monotonic() - start


def _free(run) -> None:
    import gc

    import torch

    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()


def _result(run, torch, options, durations: dict, total: float) -> dict:
    gpu = "none (dry run)" if run.dry else torch.cuda.get_device_name()
    failed = [c for c in run.checks if not c["passed"]]
    return {
        "gpu": gpu, "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": platform.platform(),
        "python": platform.python_version(), "packages": {name: _version(name) for name in PACKAGES},
        "dry_run": run.dry, "sections": options.section or "all", "seconds": {k: round(v, 1) for k, v in durations.items()},
        "total_seconds": round(total, 1), "checks": len(run.checks), "failed": failed, "skipped": run.skipped,
        "measurements": run.measurements, "passed": [c for c in run.checks if c["passed"]],
    }  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _write(result: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in result["gpu"]).strip("-") + "-" + result["date"][:10]
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(_markdown(result))
    print(f"{result['checks']} checks, {len(result['failed'])} failed, {result['total_seconds']} s -> {folder / name}.md")


def _markdown(result: dict) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in result["packages"].items() if v)
    lines = [f"# {result['gpu']}, {result['date']}", "", f"`make gpu-check`, {result['total_seconds']} s. {versions}.", ""]
    lines.append(f"{result['checks']} checks, {len(result['failed'])} failed.")
    lines += [f"- FAILED {c['section']}: {c['name']}: {c['error']} > {c['limit']} {c['note']}" for c in result["failed"]]
    for section in dict.fromkeys(m["section"] for m in result["measurements"]):
        lines += ["", f"## {section}", "", *_table([m for m in result["measurements"] if m["section"] == section])]
    lines += ["", "## Skipped", "", *(f"- {s['section']}: {s['name']}: {s['why']}" for s in result["skipped"])]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict]) -> list[str]:
    columns = list(dict.fromkeys(k for row in rows for k in row if k != "section"))
    cells = [[_cell(row.get(c, "")) for c in columns] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)]


def _cell(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
