"""The command that says which weights a precision costs most in, and writes a recipe for `latentrt build --recipe`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentrt import interrupt
from latentrt.export import recipe as recipes
from latentrt.export.errors import BuildError

if TYPE_CHECKING:
    from latentrt.export.checkpoint import Checkpoint
    from latentrt.export.progress import Report
    from latentrt.validation.sensitivity import Cost, Ranked
    from latentrt.validation.tokens import Tokens

BY = ("layer", "kind", "tensor")


def rank(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a Hugging Face DeepSeek-V2 checkpoint, or a .gguf file.")],
    precision: Annotated[str, typer.Option(help="fp8, fp8-int4, bf16-int4, int8 or int4.")] = "fp8",
    by: Annotated[str, typer.Option(help="layer, kind (a module of all layers) or tensor (a module of one).")] = "layer",
    count: Annotated[int, typer.Option("--tokens", help="How many tokens to compare on.")] = 2048,
    text: Annotated[Path | None, typer.Option(help="Text to compare on; held_out.txt of the checkpoint by default.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file to write, for latentrt build --recipe.")] = None,
    keep: Annotated[int | None, typer.Option(help="The recipe keeps the worst of them plain, this many.")] = None,
    budget: Annotated[float | None, typer.Option(help="It keeps so many, by KL per byte, that the rest costs this.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, no progress.")] = False,
) -> int:
    """Ranks weights by the KL that quantizing only them costs, in PyTorch in float32, and writes a recipe."""
    _check(precision, by, recipe, keep, budget)
    with interrupt.leaves_at_once():
        from latentrt.export.checkpoint import Checkpoint

        opened = Checkpoint(checkpoint)
        opened.check()
        from latentrt.export.progress import Report
        from latentrt.validation import tokens

    given = tokens.load(opened, text, count, opened.config.max_position_embeddings)
    _check_memory(opened, sum(map(len, given.windows)))
    found = {"checkpoint": str(checkpoint), "precision": precision, "by": by, "tokens": given.source, "recipe": None}
    with Report(quiet=as_json) as report:
        for note in opened.notes:
            report.note(note)
        ranked, kept, costs = _measure(report, opened, given, precision, by, keep, budget)
    found |= {"all": asdict(costs[0]), "ranked": list(map(_record, ranked)), "notes": report.notes}
    if recipe and kept:
        found["recipe"] = _write(recipe, found, kept, costs[1])
    if as_json:
        print(json.dumps(found))
    else:
        _show(found, recipe)
    return 0


def _measure(
    report: "Report", checkpoint: "Checkpoint", tokens: "Tokens", precision: str, by: str, keep: int | None,
    budget: float | None,
) -> "tuple[list[Ranked], list[Ranked], tuple[Cost, Cost]]":  # fmt: skip
    """All groups, the worst first; those that a recipe keeps plain; what all cost together, and all without the kept ones."""
    from latentrt.validation import sensitivity

    with report.stage("load the model, exact logits"):
        weight_format = sensitivity.format_of(precision, checkpoint.weights())
        model = sensitivity.Sensitivity(checkpoint, tokens.windows, weight_format)
    groups = sensitivity.groups(model.weights, weight_format, by)
    with report.stage(f"rank by {by}", len(groups)) as advance:
        ranked = sensitivity.rank(model, groups, advance)
    kept = ranked[:keep] if keep else []
    if budget is not None:
        with report.stage("choose for the budget", len(groups).bit_length()) as advance:
            kept = sensitivity.within(model, ranked, budget, advance)
    plain = {m for r in kept for m in r.group.modules}
    with report.stage("all together"):
        everything = model.cost([m for group in groups for m in group.modules])
        rest = model.cost([m for group in groups for m in group.modules if m not in plain]) if kept else everything
    return ranked, kept, (everything, rest)


def _check(precision: str, by: str, recipe: Path | None, keep: int | None, budget: float | None) -> None:
    """BuildError for options that are not accepted, before anything is read."""
    for name, value, accepted in (("precision", precision, tuple(recipes.QUANTIZED_ROLES)), ("by", by, BY)):
        if value not in accepted:
            raise BuildError(f"{name} is {value!r}, accepted: {', '.join(accepted)}")
    given = [name for name, value in (("--keep", keep), ("--budget", budget)) if value is not None]
    if recipe is None and given:
        raise BuildError(f"{given[0]} says what a recipe keeps, but none is to be written; give --recipe FILE too")
    if recipe is not None and len(given) != 1:
        found = " and ".join(given) or "neither"
        raise BuildError(f"--recipe needs one of --keep and --budget, found {found}; --keep 2 keeps the worst two plain")
    if keep is not None and keep < 1:
        raise BuildError(f"--keep is {keep}, accepted: 1 or more")
    if budget is not None and not budget >= 0:
        raise BuildError(f"--budget is {budget}, accepted: 0 or more, in nats")
    if recipe is not None and (recipe.is_dir() or not recipe.absolute().parent.is_dir()):
        raise BuildError(f"--recipe {recipe}: is a folder, or in a folder that is not there; give a file that can be written")


def _check_memory(checkpoint: "Checkpoint", tokens: int) -> None:
    """BuildError where the model in float32 does not fit this machine's free memory."""
    import torch

    from latentrt.validation.sensitivity import needed_memory
    from latentrt.validation.stages.engine_graph import free_memory

    needed, free = needed_memory(checkpoint.config, checkpoint.weights(), tokens), free_memory(torch.device("cpu"))
    if needed > free:
        raise BuildError(
            f"{checkpoint.path}: ranking takes about {needed / 1e9:.1f} GB of memory, for weights in float32 and the logits of "
            f"{tokens} tokens, and {free / 1e9:.1f} GB are free; give fewer --tokens, rank on a larger machine, or write the "
            "recipe by what a smaller model of the family shows: patterns such as model.layers.*.mlp.down_proj fit both"
        )


def _record(ranked: "Ranked") -> dict:
    return {"pattern": ranked.group.pattern, "modules": list(ranked.group.modules)} | asdict(ranked.cost) | {
        "plain_bytes": ranked.plain_bytes}  # fmt: skip


def _write(file: Path, found: dict, kept: "list[Ranked]", cost: "Cost") -> dict:
    """Writes the recipe; returns what --json says of it."""
    size = sum(r.plain_bytes for r in kept)
    comments = [
        f"latentrt rank {found['checkpoint']} --precision {found['precision']} --by {found['by']}, on {found['tokens']}",
        f"mean KL in nats, weights alone rounded: {found['all']['kl']:.3g} without this recipe, {cost.kl:.3g} with it, which "
        f"takes {size} bytes more",
    ]
    recipes.write(file, [r.group.pattern for r in kept], comments)
    return {"file": str(file), "plain": [r.group.pattern for r in kept], "plain_bytes": size} | asdict(cost)


def _show(found: dict, recipe: Path | None) -> None:
    """For people; `recipe` is the file that was asked for."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{found['precision']}: what rounding only these weights costs", title_justify="left")
    for name, justify in ((found["by"], "left"), ("mean KL, nats", "right"), ("same top-1", "right"), ("kept plain", "right")):
        table.add_column(name, justify=justify, overflow="fold")
    for row in found["ranked"]:
        table.add_row(row["pattern"], f"{row['kl']:.3g}", f"{row['top1']:.4f}", f"+{row['plain_bytes'] / 1e6:.3g} MB")
    Console().print(table)
    print(f"all together: mean KL {found['all']['kl']:.3g}, same top-1 {found['all']['top1']:.4f}; on {found['tokens']}")
    kept = found["recipe"]
    if kept:
        costs = f"mean KL {kept['kl']:.3g}, same top-1 {kept['top1']:.4f}, {kept['plain_bytes'] / 1e6:.3g} MB more"
        print(f"{kept['file']}: keeps {len(kept['plain'])} plain: {costs}")
    elif recipe:
        print(f"{recipe}: not written, the precision keeps within the budget without a recipe")
