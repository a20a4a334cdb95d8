"""The command that says what many GPUs would serve, before there are any."""

import json
from pathlib import Path
from typing import Annotated

import typer

from latentrt import interrupt
from latentrt.errors import UserError


def simulate(
    model: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a config.json alone.")],
    target: Annotated[list[str] | None, typer.Option(help="A GPU or a target (repeatable); H800 by default.")] = None,
    ranks: Annotated[int, typer.Option(help="GPUs of one node that share the experts.")] = 8,
    precision: Annotated[list[str] | None, typer.Option(help="Of weights (repeatable); auto: the best of the GPU's.")] = None,
    cache_format: Annotated[list[str] | None, typer.Option(help="Latent cache (repeatable); bfloat16 by default.")] = None,
    exchange: Annotated[list[str] | None, typer.Option(help="gather, gather-float32, all-to-all (repeatable).")] = None,
    trace: Annotated[Path | None, typer.Option(help="Requests as JSON lines: arrival, prompt_tokens, answer_tokens.")] = None,
    prompt: Annotated[list[int] | None, typer.Option(help="Mean tokens of drawn prompts (repeatable), 1024.")] = None,
    answer: Annotated[list[int] | None, typer.Option(help="Mean tokens of drawn answers (repeatable), 256.")] = None,
    spread: Annotated[float | None, typer.Option(help="Lengths differ from the means by up to this share, 0.5.")] = None,
    requests: Annotated[int | None, typer.Option(help="Drawn requests; twice the batch, or 512, by default.")] = None,
    rate: Annotated[float | None, typer.Option(help="Drawn requests a second; all at once by default.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Requests under way at once, at most (repeatable).")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Rows and sequences of a rank's step (repeatable).")] = None,
    chunk: Annotated[int | None, typer.Option(help="Rows of prompts in a step on a rank; all rows by default.")] = None,
    skew: Annotated[float, typer.Option(help="Experts are chosen by n^-skew; 0: all alike.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of requests and choices.")] = 0,
    assume: Annotated[list[str] | None, typer.Option(help="NAME=NUMBER, such as hbm=0.7 (repeatable).")] = None,
    kernel_times: Annotated[Path | None, typer.Option(help="Measured kernels as JSON: docs/many-gpus.md.")] = None,
    beside_67b: Annotated[bool, typer.Option("--beside-67b", help="The same requests on DeepSeek 67B.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Tells what GPUs that share the experts would serve: rooflines and this project's own scheduler, on a simulated clock."""
    drawn = {"--prompt": prompt, "--answer": answer, "--spread": spread, "--requests": requests, "--rate": rate}
    _check(drawn, trace, batch, seed)
    with interrupt.leaves_at_once():
        from latentrt.planning import gpus, simulation, traces
        from latentrt.planning.assumptions import Assumptions
        from latentrt.planning.costs import Measured
        from latentrt.planning.plan import read_config

        config = read_config(model)
    if trace:
        found = traces.read(trace)
        workloads = [simulation.Workload(None, None, size, found) for size in batch or [None]]
    else:
        spread = 0.5 if spread is None else spread
        workloads = simulation.workloads(prompt or [1024], answer or [256], batch, requests, rate, spread, seed)
    measured = Measured.read(kernel_times) if kernel_times else Measured({})
    result = simulation.simulate(config, gpus.chosen(target or ["H800"]), simulation.Question(
        ranks, precision or ["auto"], cache_format or ["bfloat16"], exchange or ["gather"], workloads, rows or [None], chunk,
        skew, seed, beside_67b, Assumptions.of(assume or []), measured,
    ))  # fmt: skip
    if as_json:
        print(json.dumps(result))
    else:
        from latentrt.planning.simulation_tables import show

        show(result)
    return 0


def _check(drawn: dict, trace: Path | None, batch: list[int] | None, seed: int) -> None:
    """UserError for numbers that cannot be, and for what a trace decides."""
    given = [name for name, value in drawn.items() if value is not None]
    if trace and given:
        raise UserError(f"--trace is given, which says what {given[0]} would; leave one of them out")
    whole = drawn | {"--batch": batch}
    for name in ("--prompt", "--answer", "--requests", "--batch"):
        values = whole[name] if isinstance(whole[name], list) else [whole[name]]
        for value in values:
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}, accepted: 1 or more")
    if seed < 0:
        raise UserError(f"--seed is {seed}, accepted: 0 or more")
    if drawn["--rate"] is not None and not 0 < drawn["--rate"] < 1e6:
        raise UserError(f"--rate is {drawn['--rate']:g}, accepted: above 0 (requests a second)")
    if drawn["--spread"] is not None and not 0 <= drawn["--spread"] <= 1:
        raise UserError(f"--spread is {drawn['--spread']:g}, accepted: 0 (all alike) to 1")
