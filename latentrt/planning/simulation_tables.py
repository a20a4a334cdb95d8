"""A simulation on a terminal."""

import sys

from rich.console import Console
from rich.table import Table

from latentrt.planning.costs import PARTS
from latentrt.planning.tables import table_of

KEYS = {"gpu": "GPU", "precision": "weights", "cache_format": "cache", "exchange": "exchange", "prompt": "prompt",
        "answer": "answer", "batch": "batch"}  # fmt: skip


def show(found: dict) -> None:
    """Prints `simulation.simulate`'s answer."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    keys = _telling(found["rows"])
    same = {name: found["rows"][0][name] for name in KEYS if name not in keys}
    words = ", ".join(f"{KEYS[name]} {value}" for name, value in same.items() if value is not None)
    console.print(f"{found['ranks']} GPUs, simulated: {words}")
    for make in (_served, _full_steps, _shares, _memory):
        console.print("", make(found, keys), sep="\n")
    if "served_67b" in found["rows"][0]:
        console.print("", _beside(found, keys), sep="\n")
    _explain(console, found)


def _telling(rows: list[dict]) -> list[str]:
    """Keys by which the rows differ; one at least."""
    return [name for name in KEYS if len({row[name] for row in rows}) > 1] or ["gpu"]


def _rows(title: str, found: dict, keys: list[str], columns: list[str], cells) -> Table:
    """A table with what tells the rows apart, then cells(row); red where nothing fits."""
    table = table_of(title, *(KEYS[name] for name in keys), *columns)
    for row in found["rows"]:
        told = cells(row) if row["served"] else ["[red]does not fit"]
        table.add_row(*("" if row[name] is None else f"{row[name]}" for name in keys), *told)
    return table


def _served(found: dict, keys: list[str]) -> Table:
    columns = ["generated/s", "steady", "prompt/s", "first token", "p99", "between", "p99", "a step", "waiting"]
    title = "Requests served: tokens a second; seconds to the first token, milliseconds between tokens (p50, p99)"
    return _rows(title, found, keys, columns, _told)


def _told(row: dict) -> list[str]:
    s = row["served"]
    rates = [s[f"{kind}_tokens_per_second"] for kind in ("generated", "steady_generated", "prompt")]
    rates = ["" if rate is None else f"{rate:,.0f}" for rate in rates]
    first = [f"{s['first_token'][p]:.2f}" for p in (50, 99)]
    between = ["" if (gap := s["between_tokens"][p]) is None else f"{1e3 * gap:.1f}" for p in (50, 99)]
    return [*rates, *first, *between, f"{s['sequences_per_step']:,.0f}", f"{s['most_waiting']:,}"]


def _full_steps(found: dict, keys: list[str]) -> Table:
    def cells(row: dict) -> list[str]:
        full = row["full_steps"]
        decode = f"{full['decode']:,.0f}" if full["decode"] else "none"
        return [f"{full['batch']:,}", f"{full['context']:,}", decode, f"{full['prompts']:,.0f}"]

    columns = ["sequences", "of tokens", "generated/s", "or prompt/s"]
    return _rows("Full steps: all sequences decode, or prompts alone are read", found, keys, columns, cells)


def _shares(found: dict, keys: list[str]) -> Table:
    def cells(row: dict) -> list[str]:
        return [f"{row['served']['time_shares'][part]:.0%}" for part in PARTS]

    return _rows("Where the time goes", found, keys, list(PARTS), cells)


def _memory(found: dict, keys: list[str]) -> Table:
    def cells(row: dict) -> list[str]:
        held = row["memory_per_rank"]
        parts = [f"{held[f'{part}_bytes'] / 1e9:.2f}" for part in ("replicated", "experts", "workspace", "cache")]
        sent = row["exchanged_bytes_per_row_and_layer"]
        return [*parts, f"{held['cache_tokens']:,}", f"{row['rows_per_rank']:,}", f"{sent:,.0f}"]

    columns = ["replicated", "experts", "workspace", "cache", "tokens", "rows a step", "bytes a row, layer"]
    return _rows("GB on each GPU, and what ranks send each other", found, keys, columns, cells)


def _beside(found: dict, keys: list[str]) -> Table:
    def cells(row: dict) -> list[str]:
        other = row["served_67b"]
        if not other:
            return ["[red]does not fit"]
        rates = other["generated_tokens_per_second"], other["prompt_tokens_per_second"]
        waits = f"{other['first_token'][50]:.2f}", f"{1e3 * (other['between_tokens'][50] or 0):.1f}"
        return [*(f"{rate:,.0f}" for rate in rates), *waits, f"{other['cache_tokens']:,}", f"{row['ratio_67b']:.2f}"]

    columns = ["generated/s", "prompt/s", "first token", "between", "cache, tokens", "ratio"]
    title = f"The same requests on DeepSeek 67B, bfloat16, tensor parallelism; the paper says {found['paper']['ratio_67b']}"
    return _rows(title, found, keys, columns, cells)


def _explain(console: Console, found: dict) -> None:
    paper = found["paper"]
    console.print(
        f"\nA simulation, not a measurement on any GPU. The paper ({paper['source']}): over "
        f"{paper['generated_tokens_per_second']:,} generated and over {paper['prompt_tokens_per_second']:,} prompt tokens/s."
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
