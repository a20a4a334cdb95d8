"""The verdict on a terminal."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from latentrt.validation.judge.findings import Findings
from latentrt.validation.report.page import number


def summarize(console: Console, content: dict, findings: Findings, files: list[Path]) -> None:
    """The verdict and what it rests on, short enough for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title, justify in (("stage", "left"), ("check", "left"), ("found", "right"), ("accepted", "right"), ("", "left")):
        table.add_column(title, justify=justify, overflow="fold")
    for c in findings.checks:
        accepted = "reported" if c.limit is None else f"{c.sense} {number(c.limit)}"
        mark = "[dim]-[/]" if c.limit is None else "[green]pass[/]" if c.passed else "[bold red]FAIL[/]"
        table.add_row(escape(c.stage), escape(c.name), number(c.value), accepted, mark)
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
        console.print(f"[bold green]PASS[/]  {escape(judged)}, {findings.tolerances}", highlight=False)
    else:
        console.print(f"[bold red]FAIL[/]  {escape(content['first_failure'])}", highlight=False, soft_wrap=True)
    for file in files:
        console.print(f"report: {escape(str(file))}", highlight=False, soft_wrap=True)
