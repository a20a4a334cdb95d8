"""python -m validation BUNDLE --reference CHECKPOINT: exit status 0 on a pass, 1 on a fail, 2 where nothing can be compared."""

import json
import os
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

from runtime import interrupt

with interrupt.leaves_at_once():
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from export.checkpoint import Checkpoint, combined_digest
    from export.errors import CheckpointError, ConfigError
    from export.models.deepseek_v2_weights import checkpoint_tensors
    from runtime.bundle import Bundle, BundleError
    from runtime.errors import RequestError
    from validation import report, tokens, tolerances
    from validation.compare import Comparison, Subject
    from validation.dequantize import bundle_config
    from validation.errors import ValidationError
    from validation.executor import AUTO, Executor

PASS, FAIL, UNUSABLE, BROKEN = 0, 1, 2, 3
DEFAULT_TOKENS = 4096
STAGES = 12
_NOT_COMPUTED = {"tie_word_embeddings", "eos_token_id", "bos_token_id", "max_position_embeddings"}  # change no number
USER_ERRORS = (ValidationError, BundleError, RequestError, CheckpointError, ConfigError)


def validate(
    bundle_path: Path, checkpoint_path: Path, target: str | None = None, text: Path | None = None,
    count: int = DEFAULT_TOKENS, progress=lambda stage: None, backend: str | None = None, device: str = AUTO,
) -> tuple[dict, Comparison]:  # fmt: skip
    """Validates one target; returns the evidence and the comparison behind it. Raises one of USER_ERRORS.

    backend, device: what runs the target, see `Executor`.
    """
    bundle = Bundle(bundle_path)
    name, entry = bundle.target(target)
    executor = Executor(bundle, name, entry, backend, device)
    executor.check()
    checkpoint = Checkpoint(checkpoint_path)
    _check_pair(bundle, checkpoint)
    try:
        row = tolerances.find(entry.precision, str(entry.options.get("accuracy", "exact")), entry.cache.format)
    except KeyError as error:
        raise ValidationError(f"{bundle.path}: target {name}: {error.args[0]}") from None
    longest = min(entry.limits.max_context, entry.limits.max_batch_tokens)
    chosen = tokens.load(checkpoint, text, count, longest)
    comparison = Comparison(Subject(bundle, name, checkpoint, chosen, row, executor, len(os.sched_getaffinity(0))), progress)
    progress("checkpoint digest")
    known = {k: v.model_dump() for k, v in bundle.manifest.checkpoint.files.items()}
    digest = combined_digest(checkpoint.file_digests(known))
    if digest != bundle.manifest.checkpoint.digest:
        comparison.findings.notes.append(
            f"the bundle was built from another checkpoint (sha256 {bundle.manifest.checkpoint.digest[:16]}…) than "
            f"{checkpoint.path} ({digest[:16]}…), so nothing is recorded in the bundle"
        )
    findings = comparison.run()
    return report.evidence(findings, bundle, name, digest), comparison


def _check_pair(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """The checkpoint must fit its own config.json, and that must be the bundle's."""
    checkpoint.check(checkpoint_tensors(checkpoint.config))
    theirs, ours = bundle_config(bundle), checkpoint.config
    for field in type(ours).model_fields:
        found, expected = getattr(ours, field), getattr(theirs, field)
        if found != expected and field not in _NOT_COMPUTED:
            raise ValidationError(
                f"{checkpoint.path}: {field} is {found!r}, the bundle's model has {expected!r}; "
                f"give the checkpoint that the bundle was built from ({bundle.manifest.checkpoint.path})"
            )


def main(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    reference: Annotated[Path, typer.Option(help="Checkpoint that the bundle was built from.")],
    report_dir: Annotated[Path | None, typer.Option("--report", help="Folder for the report.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the evidence as one JSON object, no progress.")] = False,
    target: Annotated[str | None, typer.Option(help="Target of the bundle; the only one by default.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text to compare on; held_out.txt of the checkpoint by default.")] = None,
    count: Annotated[int, typer.Option("--tokens", help="How many tokens to compare on.")] = DEFAULT_TOKENS,
    backend: Annotated[str | None, typer.Option(help="The target's own by default; torch interprets any.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1 and so on; with --backend torch for any.")] = AUTO,
) -> None:
    """Compares an engine with transformers, stage by stage and layer by layer, and gives a verdict."""
    try:
        _check_report_folder(report_dir)
        with _progress(as_json) as step:
            evidence, comparison = validate(bundle, reference, target, text, count, step, backend, device)
        files = _write(evidence, comparison, report_dir)
    except (*USER_ERRORS, OSError) as error:
        if as_json:
            print(json.dumps({"error": str(error), "kind": type(error).__name__}))
        Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(UNUSABLE)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        sys.exit(interrupt.STATUS)
    except Exception:  # a defect of ours is not a verdict on the engine: anything but the exit status of a fail
        traceback.print_exc()
        sys.exit(BROKEN)
    if as_json:
        print(json.dumps(evidence))
    else:
        report.summarize(Console(), evidence, comparison.findings, files)
    sys.exit(PASS if comparison.findings.passed else FAIL)


def _check_report_folder(folder: Path | None) -> None:
    """Refuses what could not be written in the end. Makes nothing: there may be no report."""
    there = next((p for p in (folder, *folder.absolute().parents) if p.exists()), None) if folder else None
    if there and not there.is_dir():
        raise ValidationError(f"report {folder}: {there} is a file; give a folder for the report")
    if there and not os.access(there, os.W_OK | os.X_OK):
        raise ValidationError(f"report {folder}: {there} is not writable; give another folder for the report")


def _write(evidence: dict, comparison: Comparison, folder: Path | None) -> list[Path]:
    """Evidence into the bundle (if it is this checkpoint's), report into `folder`."""
    subject, files = comparison.s, []
    if evidence["checkpoint"]["sha256"] == subject.bundle.manifest.checkpoint.digest:
        try:
            files.append(report.write_evidence(subject.bundle, subject.executor.evidence_name, evidence))
        except OSError as error:
            comparison.findings.notes.append(f"the evidence could not be recorded in the bundle: {error}")
    if folder:
        files.append(report.write_report(folder, evidence, comparison.findings, subject.tolerances.layer.limit))
    return files


def _progress(quiet: bool):
    """A bar over the stages on stderr, from the first one on; yields a function that is told of each."""
    if quiet:
        return nullcontext(lambda stage: None)
    return _Bar()


class _Bar:
    def __enter__(self):
        columns = TextColumn("{task.description:48}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn()
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.task = self.progress.add_task("", total=STAGES)
        return self._step

    def _step(self, stage: str) -> None:
        self.progress.start()
        self.progress.update(self.task, description=stage, advance=1)

    def __exit__(self, *error):
        if error[0] is None:
            self.progress.update(self.task, description="validated", completed=STAGES)
        if self.progress.live.is_started:
            self.progress.stop()


if __name__ == "__main__":
    typer.run(main)
