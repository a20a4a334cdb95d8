"""The report: one self-contained HTML page, and the evidence beside it."""

import json
from pathlib import Path

import jinja2

from latentrt.validation.judge.findings import Findings
from latentrt.validation.report.evidence import replace
from latentrt.validation.report.plots import all_plots

JSON_NAME, HTML_NAME = "validation.json", "validation.html"


def write_report(folder: Path, content: dict, findings: Findings) -> Path:
    """Writes validation.json and validation.html into `folder`; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / JSON_NAME, json.dumps(content, indent=1))
    replace(folder / HTML_NAME, render(content, all_plots(findings)))
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
