"""The results of a run as JSON and Markdown, from its state."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.gpu.state import State

PACKAGES = ("torch", "triton", "cuda-bindings", "onnx", "onnx-ir", "onnxscript", "pydantic", "safetensors", "transformers",
            "tensorrt-rtx-cu13", "tensorrt-cu13", "flash-mla", "sgl-flash-mla", "flashinfer-python")  # fmt: skip


def result(state: State, names: list[str], dry: bool, date: str, total: float) -> dict:
    """Everything that was found; `unfinished` names the sections that have not run to their end, or not yet."""
    return {
        "gpu": state.gpu, "date": date, "machine": platform.platform(),
        "python": platform.python_version(), "packages": {name: _version(name) for name in PACKAGES},
        "dry_run": dry, "sections": names, "unfinished": [n for n in names if n not in state.seconds],
        "seconds": state.seconds, "total_seconds": round(total, 1), "checks": len(state.checks),
        "failed": [c for c in state.checks if not c["passed"]], "skipped": state.skipped,
        "measurements": state.measurements, "passed": [c for c in state.checks if c["passed"]],
    }  # fmt: skip


def write(found: dict, folder: Path) -> Path:
    """<GPU>-<date>-<time>.json and .md in `folder`, each replaced at once; returns the second."""
    folder.mkdir(parents=True, exist_ok=True)
    gpu, at = "".join(c if c.isalnum() else "-" for c in found["gpu"]).strip("-"), found["date"]
    stem = folder / f"{gpu}-{at[:10]}-{at[11:19].replace(':', '')}"
    for suffix, text in ((".json", json.dumps(found, indent=1) + "\n"), (".md", markdown(found))):
        new = folder / f".{stem.name}{suffix}.new"
        new.write_text(text)
        os.replace(new, f"{stem}{suffix}")
    return Path(f"{stem}.md")


def markdown(found: dict) -> str:
    """Failures first, then the tables, then what was skipped."""
    packages = found["packages"]
    versions = ", ".join(f"{k} {v}" for k, v in packages.items() if v)
    lines = [f"# {found['gpu']}, {found['date']}", "", f"`make gpu-check`, {found['total_seconds']} s. {versions}.", ""]
    lines.append(f"{found['checks']} checks, {len(found['failed'])} failed.")
    lines += [f"- FAILED {c['section']}: {c['name']}: {c['error']} > {c['limit']} {c['note']}" for c in found["failed"]]
    lines += [f"- NOT FINISHED: {name}" for name in found["unfinished"]]
    for section in dict.fromkeys(m["section"] for m in found["measurements"]):
        rows = [m for m in found["measurements"] if m["section"] == section]
        compiler = f"Triton {packages['triton']}, PyTorch {packages['torch']}."
        lines += ["", f"## {section}", "", compiler, "", *_table(rows)]
    lines += ["", "## Skipped", "", *(f"- {s['section']}: {s['name']}: {s['why']}" for s in found["skipped"])]
    return "\n".join(lines) + "\n"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _table(rows: list[dict]) -> list[str]:
    columns = list(dict.fromkeys(k for row in rows for k in row if k != "section"))
    cells = [[_cell(row.get(c, "")) for c in columns] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)]


def _cell(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")
