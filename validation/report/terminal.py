"""The verdict on a terminal."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from latentrt.validation.judge.findings import Findings
from latentrt.validation.report.page import number


def summarize(console: Console, content: dict, findings: Findings, files: list[Path]) -> None:
    """The verdict and what it rests on, short enough for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("stage", "check", "found", "expected", "accepted", ""):
        table.add_column(title, justify="right" if title in ("found", "expected", "accepted") else "left", overflow="fold")
    for c in findings.checks:
        accepted = "reported" if c.limit is None else f"{c.sense} {number(c.limit)}"
        mark = ("-", "dim") if c.limit is None else ("pass", "green") if c.passed else ("FAIL", "bold red")
        table.add_row(Text(c.stage), Text(c.name), Text(number(c.value)), number(c.expected), accepted, Text(*mark))
    console.print(table)
    for note in findings.notes:
        line(console, f"note: {note}")
    p = findings.perplexity
    if findings.text.get("is_text") and p:
        count = findings.text["tokens"]
        console.print(f"perplexity on {count} tokens: reference {p['reference']:.3f}, engine {p['engine']:.3f}")
    line(console, f"executed: {findings.executed['summary']}")
    if findings.passed:
        judged = content["bundle"]["target"] + ("" if findings.executed["is_engine"] else " (its ONNX graph, not the engine)")
        line(console, ("PASS", "bold green"), f"  {judged}, {findings.tolerances}")
    else:
        line(console, ("FAIL", "bold red"), f"  {content['first_failure']}")
    for file in files:
        line(console, f"report: {file}")


def line(console: Console, *parts: str | tuple[str, str]) -> None:
    """One line of text, or of (text, style): what it holds is never read as markup."""
    console.print(Text.assemble(*parts), highlight=False, soft_wrap=True)
