"""One target of a bundle against its checkpoint: what may be compared, the comparison, and what is written of it."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from latentrt.export.checkpoint import Checkpoint, combined_digest
from latentrt.runtime.backends import INTERPRETER
from latentrt.runtime.backends.base import AUTO
from latentrt.runtime.backends.tensorrt.backend import DISTRIBUTIONS
from latentrt.runtime.bundle.reader import Bundle
from latentrt.validation import tokens
from latentrt.validation.bisect.bisect import Bisect
from latentrt.validation.compare import Comparison, Subject
from latentrt.validation.dequantize import bundle_config
from latentrt.validation.errors import ValidationError
from latentrt.validation.judge import tolerances
from latentrt.validation.pairs import check_pair
from latentrt.validation.report import evidence as evidences
from latentrt.validation.report import page
from latentrt.validation.stages.executor import Executor

STAGES = 15


def validate(
    bundle_path: Path, checkpoint_path: Path, target: str | None = None, text: Path | None = None, *, count: int,
    progress: Callable[[str], None] = lambda stage: None, backend: str | None = None, device: str = AUTO,
) -> tuple[dict, Comparison]:  # fmt: skip
    """Validates one target; returns the evidence and the comparison behind it. UserError where nothing can be compared.

    count: tokens to compare on. `progress` is told of every one of STAGES stages. backend, device: see `Executor`.
    """
    executor = _executor(bundle_path, target, backend, device)
    bundle, name, entry = executor.bundle, executor.name, executor.target
    executor.check()
    checkpoint = _reference(bundle, checkpoint_path)
    try:
        row = tolerances.find(entry.precision, str(entry.options.get("accuracy", "exact")), entry.cache.format)
    except KeyError as error:
        raise ValidationError(f"{bundle.path}: target {name}: {error.args[0]}") from None
    longest = min(entry.limits.max_context, entry.limits.max_batch_tokens)
    chosen = tokens.load(checkpoint, text, count, longest)
    comparison = Comparison(Subject(bundle, name, checkpoint, chosen, row, executor, len(os.sched_getaffinity(0))), progress)
    progress("checkpoint digest")
    digest = _digest(bundle, checkpoint)
    if digest != bundle.manifest.checkpoint.digest:
        comparison.findings.notes.append(
            f"the bundle was built from another checkpoint (sha256 {bundle.manifest.checkpoint.digest[:16]}…) than "
            f"{checkpoint.path} ({digest[:16]}…), so nothing is recorded in the bundle"
        )
    findings = comparison.run()
    return evidences.evidence(findings, bundle, name, digest), comparison


def prepare_bisection(
    bundle_path: Path, checkpoint_path: Path, target: str | None = None, text: Path | None = None, *, count: int,
    backend: str | None = None, device: str = AUTO,
) -> Bisect:  # fmt: skip
    """What bisects one target; of a plan, which is closed, PyTorch runs the ONNX graph that it was built from.

    UserError where nothing can be compared. All weights are held to the checkpoint, so it must be the bundle's own.
    """
    executor = _executor(bundle_path, target, backend, device)
    if executor.chosen in DISTRIBUTIONS:
        executor = replace(executor, backend=INTERPRETER)
    executor.check()
    bundle, checkpoint = executor.bundle, _reference(executor.bundle, checkpoint_path)
    digest, known = _digest(bundle, checkpoint), bundle.manifest.checkpoint.digest
    if digest != known:
        raise ValidationError(
            f"{checkpoint.path}: is another checkpoint (sha256 {digest[:16]}…) than the bundle's ({known[:16]}…), so "
            f"that every weight would differ; give the one that the bundle was built from ({bundle.manifest.checkpoint.path})"
        )
    limits = executor.target.limits
    chosen = tokens.load(checkpoint, text, count, min(limits.max_context, limits.max_batch_tokens))
    return Bisect(executor, checkpoint, chosen)


def _executor(bundle_path: Path, target: str | None, backend: str | None, device: str) -> Executor:
    bundle = Bundle(bundle_path)
    return Executor(bundle, *bundle.target(target), backend, device)


def _reference(bundle: Bundle, path: Path) -> Checkpoint:
    checkpoint = Checkpoint(path)
    check_pair(bundle_config(bundle), bundle.manifest.checkpoint.path, checkpoint)
    return checkpoint


def _digest(bundle: Bundle, checkpoint: Checkpoint) -> str:
    """The checkpoint's; files that the bundle knows by size and time are not read again."""
    return combined_digest(checkpoint.file_digests({k: v.model_dump() for k, v in bundle.manifest.checkpoint.files.items()}))


def check_report_folder(folder: Path | None) -> None:
    """Refuses what could not be written in the end. Makes nothing: there may be no report."""
    there = next((p for p in (folder, *folder.absolute().parents) if p.exists()), None) if folder else None
    if there and not there.is_dir():
        raise ValidationError(f"report {folder}: {there} is a file; give a folder for the report")
    if there and not os.access(there, os.W_OK | os.X_OK):
        raise ValidationError(f"report {folder}: {there} is not writable; give another folder for the report")


def write(evidence: dict, comparison: Comparison, folder: Path | None) -> list[Path]:
    """Evidence into the bundle (if it is this checkpoint's), report into `folder`; returns the files."""
    subject, files = comparison.s, []
    if evidence["checkpoint"]["sha256"] == subject.bundle.manifest.checkpoint.digest:
        try:
            files.append(evidences.write_evidence(subject.bundle, subject.executor.evidence_name, evidence))
        except OSError as error:
            comparison.findings.notes.append(f"the evidence could not be recorded in the bundle: {error}")
    if folder:
        files.append(page.write_report(folder, evidence, comparison.findings))
    return files
