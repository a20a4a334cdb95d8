"""Commands that hold an engine to its checkpoint."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from latentrt import interrupt
from latentrt.commands.options import BackendName, BundlePath, Device, TargetName

PASS, FAIL = 0, 1


def validate(
    bundle: BundlePath,
    reference: Annotated[Path | None, typer.Option(help="Checkpoint that the bundle was built from.")] = None,
    report_dir: Annotated[Path | None, typer.Option("--report", help="Folder for the report.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the evidence as one JSON object, no progress.")] = False,
    target: TargetName = None,
    text: Annotated[Path | None, typer.Option(help="Text to compare on; held_out.txt of the checkpoint by default.")] = None,
    count: Annotated[int, typer.Option("--tokens", help="How many tokens to compare on.")] = 4096,
    backend: BackendName = None,
    device: Device = "auto",
    bisect: Annotated[bool, typer.Option("--bisect", help="Replay part by part and name the first wrong tensor.")] = False,
    extract: Annotated[Path | None, typer.Option(help="With --bisect: folder for the first wrong part, as ONNX.")] = None,
    part: Annotated[str | None, typer.Option(help="With --extract: another part, such as model.layers.2 or head.")] = None,
    recorded: Annotated[Path | None, typer.Option(help="Judge a recorded run; BUNDLE may be its checkpoint.")] = None,
) -> int:
    """Compares an engine with transformers, stage by stage and layer by layer, and gives a verdict (exit status 0 or 1)."""
    if (extract and not bisect) or (part and not extract):
        raise typer.BadParameter("--extract needs --bisect" if extract else "--part needs --extract")
    if recorded:
        return _recorded(bundle, reference, recorded, report_dir, as_json)
    if reference is None:
        raise typer.BadParameter("give --reference, the checkpoint that the bundle was built from")
    if bisect:
        given = {"count": count, "backend": backend, "device": device}
        return _bisect((bundle, reference, target, text), given, report_dir, as_json, (extract, part))
    with interrupt.leaves_at_once():
        from rich.console import Console

        from latentrt.validation import validate as validation
        from latentrt.validation.report import terminal

    validation.check_report_folder(report_dir)
    with progress_bar(validation.STAGES, "validated", quiet=as_json) as step:
        options = {"count": count, "progress": step, "backend": backend, "device": device}
        evidence, comparison = validation.validate(bundle, reference, target, text, **options)
    files = validation.write(evidence, comparison, report_dir)
    if as_json:
        print(json.dumps(evidence))
    else:
        terminal.summarize(Console(), evidence, comparison.findings, files)
    return PASS if comparison.findings.passed else FAIL


def _recorded(subject: Path, reference: Path | None, file: Path, report_dir: Path | None, as_json: bool) -> int:
    with interrupt.leaves_at_once():
        from rich.console import Console

        from latentrt.validation import recorded
        from latentrt.validation.report import terminal
        from latentrt.validation.validate import check_report_folder

    check_report_folder(report_dir)
    with progress_bar(recorded.STAGES, "validated", quiet=as_json) as step:
        evidence, findings, bundle = recorded.judge(subject, reference, file, step)
    files = recorded.write(evidence, bundle, report_dir)
    if as_json:
        print(json.dumps(evidence))
    else:
        terminal.summarize(Console(), evidence, findings, files)
    return PASS if findings.passed else FAIL


def _bisect(subject: tuple, options: dict, report_dir: Path | None, as_json: bool, extract: tuple) -> int:
    with interrupt.leaves_at_once():
        from rich.console import Console

        from latentrt.validation import validate as validation
        from latentrt.validation.report import bisection

    validation.check_report_folder(report_dir)
    job = validation.prepare_bisection(*subject, **options)
    if extract[0]:
        job.extract(*extract)
    with progress_bar(job.stages, "validated", quiet=as_json) as step:
        found = job.run(step)
    evidence = bisection.evidence(found, job.executor)
    files = bisection.write(evidence, job.executor, report_dir)
    if as_json:
        print(json.dumps(evidence))
    else:
        bisection.summarize(Console(), found, job.executor, files, job.extraction)
    return PASS if found.passed else FAIL


def dequantize(
    bundle: BundlePath,
    reference: Annotated[Path, typer.Option(help="Checkpoint that the bundle was built from: config and tokenizer.")],
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint.")],
    target: TargetName = None,
) -> int:
    """Writes the weights that an engine computes with as a float32 Hugging Face checkpoint."""
    with interrupt.leaves_at_once():
        from latentrt.runtime.bundle.reader import Bundle
        from latentrt.validation.dequantize import write_checkpoint

    count = write_checkpoint(Bundle(bundle), target, reference, out)
    print(f"{out}: {count} tensors, float32")
    return PASS


@contextmanager
def progress_bar(stages: int, done: str, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A bar over the stages on stderr, from the first one on; yields a function that is told of each. `done`: its last word."""
    if quiet:
        yield lambda stage: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    name = TextColumn("{task.description:48}", markup=False)
    progress = Progress(name, BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), console=Console(stderr=True))
    task = progress.add_task("", total=stages)

    def step(stage: str) -> None:
        progress.start()
        progress.update(task, description=stage, advance=1)

    try:
        yield step
        progress.update(task, description=done, completed=stages)
    finally:
        if progress.live.is_started:
            progress.stop()
