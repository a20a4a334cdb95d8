"""The evidence: every number of a validation as plain JSON, with what it was measured on."""

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from latentrt.runtime.bundle.reader import Bundle
from latentrt.validation.judge.findings import Check, Findings, plain

_PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "numpy", "tokenizers", "safetensors")


def evidence(findings: Findings, bundle: Bundle, target_name: str, checkpoint_digest: str) -> dict:
    """Everything as plain JSON: verdict, checks with reasons, all numbers, versions, machine, date, digests."""
    first = findings.first_failure
    verdict = {"verdict": "pass" if findings.passed else "fail", "first_failure": describe(first) if first else None}
    body = {k: v for k, v in vars(findings).items() if k != "series"}
    return plain(verdict | subject(bundle, target_name, checkpoint_digest, findings.executed) | body)


def subject(bundle: Bundle, target_name: str, checkpoint_digest: str, executed: Mapping) -> dict:
    """What was compared with what, where, when, and with which versions."""
    target = bundle.manifest.targets[target_name]
    return {
        "date": now(),
        "machine": machine(),
        "versions": versions(executed),
        "bundle": {
            "path": str(bundle.path.resolve()), "manifest_sha256": bundle.digest, "target": target_name,
            "backend": f"{target.backend} {target.backend_version}", "precision": target.precision,
            "options": target.options, "cache_format": target.cache.format, "producer": bundle.manifest.producer,
        },
        "checkpoint": {"path": bundle.manifest.checkpoint.path, "sha256": checkpoint_digest},
    }  # fmt: skip


def now() -> str:
    """Date and time, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions(executed: Mapping) -> dict[str, str]:
    """Of Python, of the packages that compare, and of those that ran the engine (`Executor.describe`)."""
    return {"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES} | executed["packages"]


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


def write_json(folder: Path, name: str, content: dict) -> Path:
    """A file of a report's folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / name, json.dumps(content, indent=1))
    return folder / name


def replace(file: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    with draft.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(draft, file)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
