"""The command that says what fits where before any work."""

import json
from pathlib import Path
from typing import Annotated

import typer

from latentrt import interrupt
from latentrt.errors import UserError


def plan(
    model: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a config.json alone.")],
    target: Annotated[list[str] | None, typer.Option(help="A target such as sm89, or a GPU such as H100 (repeatable).")] = None,
    gpus: Annotated[int, typer.Option(help="How many GPUs work together.")] = 1,
    context: Annotated[int | None, typer.Option(help="Tokens of a sequence; the model's own limit by default.")] = None,
    cache_format: Annotated[str, typer.Option(help="Latent cache that batch and speed are told for.")] = "bfloat16",
    paper: Annotated[bool, typer.Option("--paper", help="The paper's claims beside what dimensions give.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draws throughput over context, by cache format, as PNG or SVG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Tells what fits which GPU, and how fast it can be at best, from a model's dimensions: nothing is built or read."""
    if plot and plot.suffix not in (".png", ".svg"):
        raise UserError(f"--plot is {str(plot)!r}, accepted: a file that ends in .png or .svg")
    with interrupt.leaves_at_once():
        from latentrt.planning import gpus as table
        from latentrt.planning import paper as claimed
        from latentrt.planning import plan as plans
        from latentrt.planning.sizes import Model

        rows = table.chosen(target)
        config = plans.read_config(model)
    found = plans.plan(config, rows, gpus, context, cache_format)
    if paper:
        found["paper"] = claimed.claims(Model.of(config))
    if plot:
        from latentrt.planning.plot import draw

        draw(plot, {row.name: plans.throughput(config, row, gpus) for row in rows}, gpus)
    if as_json:
        print(json.dumps(found))
    else:
        from latentrt.planning.tables import show

        show(found)
    return 0
