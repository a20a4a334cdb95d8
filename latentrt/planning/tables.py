"""A plan on a terminal."""

import sys

from rich.console import Console
from rich.table import Table

MOST_COLUMNS = 20  # GPUs in the table of what fits

def show(plan: dict) -> None:
    """Prints `plan.plan`'s answer."""
    console, model = Console(highlight=False, width=None if sys.stdout.isatty() else 120), plan["model"]
    console.print(
        f"{model['layers']} layers, {model['parameters'] / 1e9:.2f} B parameters, of which a token meets "
        f"{model['active_parameters'] / 1e9:.2f} B; {model['routed_expert_parameters'] / 1e9:.2f} B in routed experts"
    )
    many = (_memory(plan), _ranks(plan)) if plan["gpu_count"] > 1 else ()
    for table in (_weights(plan), _caches(plan), _gpus(plan), *many):
        console.print("", table, sep="\n")
    console.print(
        "\nRooflines: what memory and tensor cores at full speed would take; real steps take longer. "
        f"{plan['usable_memory']:.0%} of the memory is for weights, workspace and cache. Experts are shared out over the GPUs, "
        "all else is on each. docs/planning.md tells the formulas."
    )
    if "paper" in plan:
        _paper(console, plan["paper"])


def _weights(plan: dict) -> Table:
    table = table_of("Weights", "precision", "GB", "routed experts", "embedding", "all else")
    for name, size in plan["weights"].items():
        table.add_row(name, *(f"{size[part] / 1e9:.2f}" for part in ("total", "routed", "embedding", "rest")))
    return table


def _caches(plan: dict) -> Table:
    table = table_of("Latent cache", "format", "bytes a token", "bits an element", "less than DeepSeek 67B's")
    for name, cache in plan["caches"].items():
        saved = f"{cache['saved_of_67b']:.2%}"
        table.add_row(name, f"{cache['bytes_per_token']:,}", f"{cache['bits_per_element']:.2f}", saved)
    return table


def _gpus(plan: dict) -> Table:
    count, context, cache = plan["gpu_count"], plan["context"], plan["cache_format"]
    title = f"{count} GPU{'s' * (count > 1)}, sequences of {context:,} tokens, {cache} cache"
    table = table_of(title, "GPU", "weights", "GB on each", "cache, tokens", "largest batch", "tokens/s alone", "of the batch",
                     "bound by", "of prompts", "fits from")  # fmt: skip
    for row in plan["gpus"]:
        decode, prefill = row["decode"], row["prefill"]
        cells = [row["name"], row["precision"], f"{row['weight_bytes_per_gpu'] / 1e9:.1f}", f"{row['cache_tokens'][cache]:,}"]
        if decode:
            first, last = decode["1"], list(decode.values())[-1]
            cells += [f"{row['largest_batch']:,}", _speed(first), _speed(last), last["bound"], _speed(prefill)]
        else:
            cells += ["[red]none", "", "", "", ""]
        fewest = row["fewest_gpus"]
        table.add_row(*cells, "never" if fewest is None else f"{fewest} GPU{'s' * (fewest > 1)}")
    return table


def _memory(plan: dict) -> Table:
    count, cache = plan["gpu_count"], plan["cache_format"]
    table = table_of(f"GB on each of {count} GPUs", "GPU", "weights", f"{plan['usable_memory']:.0%} of it", "on every GPU",
                     "its experts", "workspace", "left for cache", f"tokens of {cache}, all GPUs")  # fmt: skip
    for row in plan["ranks"]:
        held = row["by_count"][count]
        parts = row["usable_bytes"], row["replicated_bytes"], *(held[f"{k}_bytes"] for k in ("experts", "workspace", "cache"))
        table.add_row(row["name"], row["precision"], *(f"{part / 1e9:.2f}" for part in parts), f"{held['cache_tokens']:,}")
    return table


def _ranks(plan: dict) -> Table:
    counts = [n for n in plan["ranks"][0]["by_count"] if n <= MOST_COLUMNS]
    table = table_of("Thousand tokens of cache on so many GPUs, which share the experts", "GPU", "weights", *map(str, counts))
    for row in plan["ranks"]:
        tokens = [row["by_count"][n]["cache_tokens"] for n in counts]
        table.add_row(row["name"], row["precision"], *(f"{n / 1e3:,.0f}" if n else "[red]none" for n in tokens))
    return table


def _speed(found: dict) -> str:
    return f"{found['tokens_per_second']:,.0f}"


def table_of(title: str | None, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", header_style="dim")
    return table


def _paper(console: Console, claims: dict) -> None:
    saved = claims["cache_saved"]
    console.print("\n[bold]Beside DeepSeek-V2's paper (arXiv 2405.04434)")
    console.print(
        f"cache: 6 bits an element spare {saved['6 bits']:.2%} of DeepSeek 67B's, 16 bits {saved['bfloat16']:.2%}; "
        f"the paper says {claims['cache_saved_paper']:.1%}"
    )
    table = table_of(None, "context", "batch", "tokens/s", "bound by", "67B's batch", "tokens/s", "bound by", "ratio")
    for row in claims["ratios"]:
        cells = [f"{row['context']:,}"]
        for which in ("", "_67b"):
            cells += [f"{row['batch' + which]:,}", f"{row['tokens_per_second' + which]:,.0f}", row["bound" + which]]
        table.add_row(*cells, f"{row['ratio']:.2f}")
    console.print(table)
    console.print(f"throughput: the paper says {claims['ratio_paper']} times DeepSeek 67B's, and over 50K tokens/s")
    console.print(f"prompts of 4,096 tokens: {claims['prompt_tokens_per_second']:,.0f} tokens/s at best; the paper says 100K")
    for title in ("assumptions", "unreproduced"):
        console.print(f"{title}:")
        for line in claims[title]:
            console.print(f"- {line}")
