"""How far two sources are apart, as JSON and on a terminal."""

from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from latentrt.validation.judge.findings import plain
from latentrt.validation.report.evidence import machine, now
from latentrt.validation.report.page import number
from latentrt.validation.report.terminal import line
from latentrt.validation.sources.difference import Difference
from latentrt.validation.sources.pair import Pair
from latentrt.validation.tokens import Tokens


def content(pair: Pair, tokens: Tokens, found: Difference) -> dict:
    """Everything as plain JSON."""
    text = {"source": tokens.source, "tokens": found.tokens, "windows": len(tokens.windows), "is_text": tokens.is_text}
    sides = {"first": pair.first.describe(), "second": pair.second.describe()}
    return plain({"date": now(), "machine": machine(), **sides, "text": text} | asdict(found))


def summarize(console: Console, told: dict) -> None:
    """Short enough for a terminal."""
    for name in ("first", "second"):
        line(console, f"{name:7} {told[name]['name']}: {told[name]['executed']}")
    line(console, f"{told['text']['tokens']} tokens in {told['text']['windows']} windows: {told['text']['source']}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title, justify in (("", "left"), ("found", "right"), ("standard error", "right"), ("", "left")):
        table.add_column(title, justify=justify)
    for row in _rows(told):
        table.add_row(*map(Text, row))
    console.print(table)
    line(console, _parting(told["first_parting"]))


def _rows(told: dict) -> list[tuple[str, str, str, str]]:
    window, position = told["kl_max_at"]
    share = "" if told["kl_is_whole"] else f"at least: over tokens that both tell, {told['covered']:.2%} of the probability"
    rows = [
        ("KL of the second, mean nats", number(told["kl_mean"]), number(told["kl_error"]), share),
        ("KL, largest", number(told["kl_max"]), "", f"window {window}, position {position}"),
        ("top-1 agreement", f"{told['top1_agreement']:.4f}", number(told["top1_error"]), ""),
    ]
    if told["text"]["is_text"]:
        both = f"{told['perplexity_first']:.4f} and {told['perplexity_second']:.4f}"
        rows.append(("perplexity, difference", f"{told['perplexity_difference']:+.4f}", number(told["perplexity_error"]), both))
    return rows


def _parting(parting: dict | None) -> str:
    if parting is None:
        return "no position has another likeliest token"
    margin = "further than the first source tells" if parting["margin"] is None else f"{parting['margin']:.3g} nats"
    return (
        f"first position with another likeliest token: window {parting['window']}, position {parting['position']}: "
        f"{parting['first']} and {parting['second']}, apart by {margin} in the first"
    )
