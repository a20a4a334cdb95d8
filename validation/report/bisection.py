"""What a bisection found, as JSON and on a terminal: every tensor's found error beside the one that rounding should make."""

import json
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from latentrt.runtime.bundle.reader import BISECTED
from latentrt.validation.bisect.bisect import DEFECT, Bisection, Looked
from latentrt.validation.bisect.diagnosis import Defect
from latentrt.validation.bisect.extract import Extraction
from latentrt.validation.judge.findings import plain
from latentrt.validation.judge.routing import Flip
from latentrt.validation.report.evidence import replace, subject, write_evidence
from latentrt.validation.report.page import number
from latentrt.validation.report.terminal import line
from latentrt.validation.stages.executor import Executor

JSON_NAME = "bisection.json"
_SHOWN = 4  # defects of further parts, and flips, that are told one by one


def evidence(found: Bisection, executor: Executor) -> dict:
    """Everything as plain JSON: verdict, defects, all tensors, flips, and what `evidence.subject` says."""
    digest = executor.bundle.manifest.checkpoint.digest
    told = {"verdict": found.verdict, "first_defect": describe(found.defects[0]) if found.defects else None}
    return plain(told | subject(executor.bundle, executor.name, digest, found.executed) | vars(found))


def write(content: dict, executor: Executor, folder: Path | None) -> list[Path]:
    """Into the bundle, where it may be written, and into `folder`; returns the files."""
    files = []
    try:
        files.append(write_evidence(executor.bundle, executor.evidence_name + BISECTED, content))
    except OSError as error:
        content["executed"]["note"] = f"the evidence could not be recorded in the bundle: {error}"
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        replace(folder / JSON_NAME, json.dumps(content, indent=1))
        files.append(folder / JSON_NAME)
    return files


def describe(defect: Defect) -> str:
    """One line: where, by the checkpoint's name and the graph's, and what fits."""
    value = f" ({defect.value})" if defect.value else ""
    return f"{defect.place}{value}: {defect.hypothesis.kind}: {defect.hypothesis.words}"


def summarize(
    console: Console, found: Bisection, executor: Executor, files: list[Path], extraction: Extraction | None = None
) -> None:
    """Found errors against expected ones, tensor by tensor, each in the part where it is worst; then the verdict."""
    console.print(_table(found))
    text = found.text
    steps = f"{text['tokens']} tokens in {text['steps']} steps over {text['pages']} pages"
    line(console, f"replayed: {steps}, each part alone on the formulas' hidden states; {found.seconds:g} s")
    line(console, f"executed: {found.executed['summary']}")
    _flips(console, found.flips)
    target = executor.target
    judged = f"{executor.name}, {target.precision}, cache {target.cache.format}"
    if found.passed:
        line(console, (f"PASS: {found.verdict}", "bold green"), f"  {judged}")
    for index, defect in enumerate(found.defects[: 1 + _SHOWN]):
        _defect(console, defect, index == 0)
    if len(found.defects) > 1 + _SHOWN:
        line(console, f"and in {len(found.defects) - 1 - _SHOWN} parts more: see the report")
    for file in files:
        line(console, f"report: {file}")
    if extraction:
        _extracted(console, extraction)


def _extracted(console: Console, extraction: Extraction) -> None:
    if not extraction.written:
        line(console, "extracted: nothing, since no part has a defect; --part NAME takes any")
        return
    line(console, f"extracted: {extraction.folder}; python {extraction.folder / 'reproduce.py'} shows the errors")
    for note in extraction.notes:
        line(console, f"  {note}")


def _table(found: Bisection) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("tensor", "worst in", "found", "expected", "of limit", ""):
        table.add_column(title, justify="left" if title in ("tensor", "worst in", "") else "right", no_wrap=True)
    for looked in _worst(found.looked):
        s = looked.spread
        mark = ("ok", "green") if s.passes else (DEFECT, "bold red")
        part = looked.part.replace("model.layers.", "layer ")
        table.add_row(Text(looked.tensor), part, number(s.found.whole), number(s.expected.whole), _share(s.ratio), Text(*mark))
    return table


def _share(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 1000 else f"{ratio:.0e}"


def _worst(looked: list[Looked]) -> list[Looked]:
    """Of every tensor the part in which it comes nearest to its limit, or farthest beyond."""
    worst: dict[str, Looked] = {}
    for k in looked:
        if k.tensor not in worst or not k.spread.ratio <= worst[k.tensor].spread.ratio:
            worst[k.tensor] = k
    return list(worst.values())


def _flips(console: Console, flips: list[Flip]) -> None:
    explained = [f for f in flips if f.explained]
    if explained:
        widest = max(explained, key=lambda f: f.score_margin)
        line(console, f"routing flips on a near tie: {len(explained)}, the widest with a gate margin of "
             f"{widest.score_margin:.2g} (layer {widest.layer}, token {widest.token})")  # fmt: skip


def _defect(console: Console, defect: Defect, is_first: bool) -> None:
    words = "DEFECT, first at" if is_first else "and at"
    line(console, (words, "bold red"), f"  {defect.place}")
    what = f"{defect.tensor}, {defect.what}" if defect.what else defect.tensor
    line(console, f"  tensor      {what}; in the graph {defect.value}" + (f", node {defect.node}" if defect.node else ""))
    if defect.spread:
        s = defect.spread
        line(console, f"  error       found {number(s.found.whole)}, expected {number(s.expected.whole)}, "
             f"limit {number(s.limit.whole)}; row {s.found.worst_row} is worst ({number(s.found.row)})")  # fmt: skip
    line(console, "  hypothesis  ", (defect.hypothesis.kind, "bold"), f": {defect.hypothesis.words}")
    if is_first:
        for other in defect.others:
            line(console, f"  less fits   {other.kind}: {other.words} (leaves {other.left:.0%} of the error)")
