"""The command that ranks weights by what quantizing them costs, and writes recipes."""

import json
from pathlib import Path
from typing import Annotated

import typer

from latentrt import interrupt
from latentrt.errors import UserError

PRECISIONS, BY = ("fp8", "int8", "int4"), ("tensor", "kind", "layer")
SHOWN = 20


def rank(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a Hugging Face DeepSeek-V2 checkpoint, or a .gguf file.")],
    precision: Annotated[str, typer.Option(help="fp8, int8 or int4.")] = "fp8",
    by: Annotated[str, typer.Option(help="tensor, kind (one module in all layers) or layer.")] = "tensor",
    text: Annotated[Path | None, typer.Option(help="Text to measure on; held_out.txt of the checkpoint by default.")] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens to measure on.")] = 2048,
    recipe: Annotated[Path | None, typer.Option(help="Writes what should stay plain, for build --recipe.")] = None,
    grow: Annotated[float, typer.Option(help="By how many percent the recipe may make the weights grow.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, no progress.")] = False,
) -> int:
    """Ranks weights by the KL that quantizing only them costs; writes a recipe of those worth keeping."""
    _check(precision, by, grow, recipe)
    with interrupt.leaves_at_once():
        from latentrt.export.checkpoint import Checkpoint

        opened = Checkpoint(checkpoint)
        opened.check()
        from latentrt.planning.sizes import formats_of
        from latentrt.validation import ranking
        from latentrt.validation import tokens as held_out
        from latentrt.validation.stages.engine_graph import free_memory

        found = held_out.load(opened, text, tokens, opened.config.max_position_embeddings)
        weight_format = formats_of(opened.weights(False))[precision]
        ranked = ranking.Ranking(opened, weight_format, found.windows, free_memory())
        costs = _costs(ranked, by, quiet=as_json)
        everything = ranked.cost([w for group in ranked.groups("tensor").values() for w in group])
        kept = ranking.chosen(costs, ranked.size, grow)
        patterns = [cost.pattern for cost in kept]
        rest = [w for pattern, group in ranked.groups(by).items() if pattern not in patterns for w in group]
        mended = ranked.cost(rest)
    answer = {
        "precision": precision, "by": by, "tokens": found.source, "weight_bytes": ranked.size,
        "all": _pair(everything), "recipe": {"plain": patterns, "grows": sum(c.grows for c in kept)} | _pair(mended),
        "costs": [vars(cost) for cost in costs],
    }  # fmt: skip
    if recipe:
        heading = f"latentrt rank {checkpoint} --precision {precision} --by {by} --grow {grow:g}"
        recipe.write_text(ranking.recipe_text(kept, heading))
    print(json.dumps(answer)) if as_json else _show(answer, recipe)
    return 0


def _check(precision: str, by: str, grow: float, recipe: Path | None) -> None:
    for name, value, accepted in (("precision", precision, PRECISIONS), ("by", by, BY)):
        if value not in accepted:
            raise UserError(f"--{name} is {value!r}, accepted: {', '.join(accepted)}")
    if not 0 <= grow <= 1000:
        raise UserError(f"--grow is {grow:g}, accepted: 0 to 1000 percent")
    if recipe and recipe.exists():
        raise UserError(f"--recipe: {recipe} is there already; name a new file")
    if recipe and not recipe.parent.is_dir():
        raise UserError(f"--recipe: {recipe.parent} is not a folder; name a file in one that is there")


def _pair(measured: tuple[float, float]) -> dict[str, float]:
    return dict(zip(("kl", "top1"), measured, strict=True))


def _costs(ranked, by: str, quiet: bool) -> list:
    if quiet:
        return ranked.rank(by)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description:48}", markup=False), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(ranked.groups(by)))
        return ranked.rank(by, lambda pattern: progress.update(task, description=pattern, advance=1))


def _told(measured: dict) -> str:
    return f"KL {measured['kl']:.2e} nats, top-1 {measured['top1']:.2%}"


def _show(answer: dict, recipe: Path | None) -> None:
    import sys

    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("only this quantized", "KL, nats", "top-1", "MB more if plain"):
        table.add_column(column, justify="left" if column == "only this quantized" else "right")
    for cost in answer["costs"][:SHOWN]:
        table.add_row(cost["pattern"], f"{cost['kl']:.2e}", f"{cost['top1']:.2%}", f"{cost['grows'] / 1e6:.1f}")
    console.print(table)
    more = len(answer["costs"]) - SHOWN
    if more > 0:
        console.print(f"and {more} more, each less; --json has them all")
    everything, mended = answer["all"], answer["recipe"]
    console.print(f"\nall quantized: {_told(everything)}, {answer['weight_bytes'] / 1e6:.1f} MB ({answer['tokens']})")
    if mended["plain"]:
        console.print(f"{len(mended['plain'])} plain: {_told(mended)}, {mended['grows'] / 1e6:.1f} MB more")
    else:
        console.print("nothing of this is small enough to stay plain: raise --grow, or rank --by tensor")
    if recipe:
        console.print(f"{recipe} written: latentrt build ... --precision {answer['precision']} --recipe {recipe}")
