"""A simulation on a terminal."""

import sys
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from latentrt.planning.costs import PARTS
from latentrt.planning.tables import table_of

KEYS = {"gpu": "GPU", "precision": "weights", "cache_format": "cache", "exchange": "exchange", "rows_per_rank": "rows",
        "prompt": "prompt", "answer": "answer", "batch": "batch"}  # fmt: skip


def show(found: dict) -> None:
    """Prints `simulation.simulate`'s answer."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    keys = _telling(found["rows"])
    same = {name: found["rows"][0][name] for name in KEYS if name not in keys}
    words = ", ".join(f"{KEYS[name]} {value}" for name, value in same.items() if value is not None)
    console.print(f"{found['ranks']} GPU{'s' * (found['ranks'] > 1)}, simulated: {words}")
    for title, columns, cells in (*TABLES, *([BESIDE] if "served_67b" in found["rows"][0] else [])):
        console.print(f"\n[bold]{title}")
        console.print(_rows(found["rows"], keys, columns, cells))
    _explain(console, found)


def _telling(rows: list[dict]) -> list[str]:
    """Keys by which the rows differ; one at least."""
    return [name for name in KEYS if len({row[name] for row in rows}) > 1] or ["gpu"]


def _rows(rows: list[dict], keys: list[str], columns: list[str], cells: Callable[[dict], list[str]]) -> Table:
    """A table with what tells the rows apart, then cells(row); red where nothing fits."""
    table = table_of(None, *(KEYS[name] for name in keys), *columns)
    for row in rows:
        told = cells(row) if row["served"] else ["[red]does not fit"]
        table.add_row(*("" if row[name] is None else f"{row[name]}" for name in keys), *told)
    return table


def _served(row: dict) -> list[str]:
    s = row["served"]
    rates = [s[f"{kind}_tokens_per_second"] for kind in ("generated", "steady_generated", "prompt")]
    first = [f"{s['first_token'][p]:.2f}" for p in (50, 99)]
    between = ["" if (gap := s["between_tokens"][p]) is None else f"{1e3 * gap:.1f}" for p in (50, 99)]
    return [*map(_rate, rates), *first, *between, f"{s['sequences_per_step']:,.0f}", f"{s['most_waiting']:,}"]


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{rate:,.0f}"


def _full_steps(row: dict) -> list[str]:
    full = row["full_steps"]
    return [f"{full['batch']:,}", f"{full['context']:,}", _rate(full["decode"]), f"{full['prompt']:,}", _rate(full["prompts"])]


def _shares(row: dict) -> list[str]:
    return [f"{row['served']['time_shares'][part]:.0%}" for part in PARTS]


def _memory(row: dict) -> list[str]:
    held, sent = row["memory_per_rank"], row["exchanged_bytes_per_row_and_layer"]
    parts = [f"{held[f'{part}_bytes'] / 1e9:.2f}" for part in ("replicated", "experts", "workspace", "cache")]
    return [*parts, f"{held['cache_tokens']:,}", f"{sent:,.0f}"]


def _beside(row: dict) -> list[str]:
    other = row["served_67b"]
    if not other:
        return ["[red]does not fit"]
    rates = other["generated_tokens_per_second"], other["prompt_tokens_per_second"]
    waits = f"{other['first_token'][50]:.2f}", f"{1e3 * (other['between_tokens'][50] or 0):.1f}"
    return [*map(_rate, rates), *waits, f"{other['cache_tokens']:,}", f"{row['ratio_67b']:.2f}"]


TABLES = (
    ("Requests served: tokens a second, p50 and p99 of waiting, sequences in a step, most that waited",
     ["generated/s", "steady", "prompt/s", "first, s", "p99", "between, ms", "p99", "a step", "waiting"], _served),
    ("Full steps: as many sequences decode, or prompts alone are read",
     ["sequences", "of tokens", "generated/s", "or prompts of", "prompt/s"], _full_steps),
    ("Where the time goes", list(PARTS), _shares),
    ("GB on each GPU, tokens of its cache, and what ranks send each other",
     ["replicated", "experts", "workspace", "cache", "tokens", "bytes a row, layer"], _memory),
)  # fmt: skip
BESIDE = (
    "The same requests on DeepSeek 67B, bfloat16, tensor parallelism",
    ["generated/s", "prompt/s", "first, s", "between, ms", "cache, tokens", "V2 : 67B"], _beside,
)  # fmt: skip


def _explain(console: Console, found: dict) -> None:
    for wrong in dict.fromkeys(row["refusal"] for row in found["rows"] if row["refusal"]):
        console.print(f"\n[red]does not fit:[/] {wrong}")
    paper = found["paper"]
    console.print(
        f"\nA simulation, not a measurement on any GPU. The paper ({paper['source']}): over "
        f"{paper['generated_tokens_per_second']:,} generated and over {paper['prompt_tokens_per_second']:,} prompt tokens/s, "
        f"{paper['ratio_67b']} times DeepSeek 67B."
    )
    if found["measured"]:
        console.print(f"Kernel times as given: {', '.join(found['measured'])}; all others from rooflines.")
    table = table_of("Assumed (--assume NAME=NUMBER changes one)", "name", "value", "", "source")
    for row in found["assumptions"]:
        mark = "" if row["value"] == row["default"] else f" (default {row['default']:g})"
        table.add_row(row["name"], f"{row['value']:g}{mark}", row["unit"], row["source"])
    for column in table.columns[2:]:
        column.justify = "left"
    console.print("", table, sep="\n")
