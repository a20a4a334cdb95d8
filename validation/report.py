"""The report: one JSON with every number, one self-contained HTML page, and a short summary for the terminal."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jinja2
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from runtime.bundle import Bundle
from validation.findings import Check, Findings, plain
from validation.plots import all_plots

JSON_NAME, HTML_NAME = "validation.json", "validation.html"
_PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "numpy", "tokenizers", "safetensors")


def evidence(findings: Findings, bundle: Bundle, target_name: str, checkpoint_digest: str) -> dict:
    """Everything as plain JSON: verdict, checks with reasons, all numbers, versions, machine, date, digests."""
    target, first = bundle.manifest.targets[target_name], findings.first_failure
    body = {k: v for k, v in vars(findings).items() if k != "series"}
    return plain(
        {
            "verdict": "pass" if findings.passed else "fail",
            "first_failure": describe(first) if first else None,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(findings),
            "bundle": {
                "path": str(bundle.path.resolve()), "manifest_sha256": bundle.digest, "target": target_name,
                "backend": f"{target.backend} {target.backend_version}", "precision": target.precision,
                "options": target.options, "cache_format": target.cache.format, "producer": bundle.manifest.producer,
            },
            "checkpoint": {"path": bundle.manifest.checkpoint.path, "sha256": checkpoint_digest},
        }
        | body
    )  # fmt: skip


def versions(findings: Findings) -> dict[str, str]:
    """Of Python, of the packages that compare, and of those that ran the engine."""
    return {"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES} | findings.executed["packages"]


def describe(check: Check) -> str:
    """One line on a failed check: where, what was found, what is accepted."""
    if check.limit is None:
        return f"{check.stage}: {check.name}"
    accepted = f"accepted {check.sense} {check.limit:g}"
    return f"{check.stage}: {check.name} is {check.value:.4g} ({accepted})" + (f"; {check.detail}" if check.detail else "")


def machine() -> str:
    """Processor, cores that may be used, and system."""
    name = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name += ", " + next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, {platform.system()}"


def write_evidence(bundle: Bundle, name: str, content: dict) -> Path:
    """Puts the evidence into the bundle, under its manifest's digest and `Executor.evidence_name`."""
    file = bundle.evidence_file(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    replace(file, json.dumps(content, indent=1))
    return file


def write_report(folder: Path, content: dict, findings: Findings, layer_limit: float | None) -> Path:
    """Writes validation.json and validation.html into `folder`; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / JSON_NAME, json.dumps(content, indent=1))
    replace(folder / HTML_NAME, render(content, all_plots(findings, layer_limit)))
    return folder / HTML_NAME


def render(content: dict, plots: dict[str, str]) -> str:
    """The HTML page; it refers to nothing outside itself."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"num": number, "pct": lambda v: "-" if isinstance(v, str) else f"{v * 100:.2f} %"}
    return environment.get_template("report.html.j2").render(r=content, plots=plots)


def number(value) -> str:
    """Three significant digits; None and text as they are."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e6):
        return f"{int(value):,}"
    return f"{value:.3g}"


def replace(file: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    with draft.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(draft, file)


def summarize(console: Console, content: dict, findings: Findings, files: list[Path]) -> None:
    """The verdict and what it rests on, short enough for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title, justify in (("stage", "left"), ("check", "left"), ("found", "right"), ("accepted", "right"), ("", "left")):
        table.add_column(title, justify=justify, overflow="fold")
    for c in findings.checks:
        accepted = "reported" if c.limit is None else f"{c.sense} {number(c.limit)}"
        mark = "[dim]-[/]" if c.limit is None else "[green]pass[/]" if c.passed else "[bold red]FAIL[/]"
        table.add_row(c.stage, c.name, number(c.value), accepted, mark)
    console.print(table)
    for note in findings.notes:
        console.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)
    p = findings.perplexity
    if findings.text.get("is_text") and p:
        count = findings.text["tokens"]
        console.print(f"perplexity on {count} tokens: reference {p['reference']:.3f}, engine {p['engine']:.3f}")
    console.print(f"executed: {escape(findings.executed['summary'])}", highlight=False, soft_wrap=True)
    if findings.passed:
        judged = content["bundle"]["target"] + ("" if findings.executed["is_engine"] else " (its ONNX graph, not the engine)")
        console.print(f"[bold green]PASS[/]  {judged}, {findings.tolerances}", highlight=False)
    else:
        console.print(f"[bold red]FAIL[/]  {escape(content['first_failure'])}", highlight=False, soft_wrap=True)
    for file in files:
        console.print(f"report: {escape(str(file))}", highlight=False, soft_wrap=True)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
