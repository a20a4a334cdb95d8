"""The command that builds bundles."""

import json
from pathlib import Path
from typing import Annotated

import typer

from latentrt import interrupt
from latentrt.export.targets import TARGETS


def build(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a Hugging Face DeepSeek-V2 checkpoint, or a .gguf file.")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle.")],
    target: Annotated[str, typer.Option(help=f"One or more of: {','.join(TARGETS)}.")] = "cpu",
    precision: Annotated[str, typer.Option(help="auto, fp8, bf16, fp8-int4, bf16-int4, int8, int4 or fp32.")] = "auto",
    accuracy: Annotated[str, typer.Option(help="int8 and int4: exact (float32 sums) or fast (int8 activations).")] = "fast",
    cache_format: Annotated[str, typer.Option(help="Latent cache: docs/pipeline.md tells the formats.")] = "auto",
    max_context: Annotated[int | None, typer.Option(help="Longest sequence; the model's own limit by default.")] = None,
    weights: Annotated[str, typer.Option(help="GPUs: inputs (shared by targets) or embedded in the plan.")] = "inputs",
    activations: Annotated[str, typer.Option(help="Scales of fp8 activations: dynamic, or static per linear.")] = "dynamic",
    calibration: Annotated[Path | None, typer.Option(help="Sample tokens for static: a text, or JSON lists of ids.")] = None,
    prefill: Annotated[str, typer.Option(help="Prompt chunks on GPUs: expanded (a second plan) or absorbed.")] = "auto",
    recipe: Annotated[Path | None, typer.Option(help="TOML file that says which quantized weights stay plain.")] = None,
    ranks: Annotated[int, typer.Option(help="Processes, a GPU each, that share the experts: a divisor of their number.")] = 1,
    collectives: Annotated[str, typer.Option(help="How GPU ranks are joined: native (TensorRT's own) or plugin.")] = "native",
    force: Annotated[bool, typer.Option(help="Replace a target, or a bundle of another checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, no progress.")] = False,
) -> int:
    """Builds an engine bundle for one or more targets from a DeepSeek-V2-family checkpoint."""
    with interrupt.leaves_at_once():
        from latentrt import preflight
        from latentrt.export.options import BuildOptions

        options = BuildOptions(
            target, precision, accuracy, cache_format, max_context, weights, activations, calibration, prefill, force,
            recipe, ranks, collectives,
        )
        order = preflight.check(checkpoint, out, options)  # what is refused is refused before the imports that take seconds
        from latentrt import builder

    try:
        summary = builder.run(order, quiet=as_json)
    except KeyboardInterrupt:
        from latentrt.commands import console

        console.note("interrupted; run the same command to resume")
        return interrupt.STATUS
    if as_json:
        print(json.dumps(summary))
        return 0
    for entry in summary["targets"]:
        verb = "built" if entry["built"] else "is up to date:"
        print(f"{out} {verb} target {entry['target']}, {entry['precision']}, {summary['bytes'] / 1e6:.1f} MB")
    return 0
