"""The command that writes quantized checkpoints for other engines."""

import json
from pathlib import Path
from typing import Annotated

import typer

from latentrt import interrupt
from latentrt.export.publishing import FORMATS


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a Hugging Face DeepSeek-V2 checkpoint, or a .gguf file.")],
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint.")],
    form: Annotated[str, typer.Option("--format", help=f"One of: {', '.join(FORMATS)}.")] = "fp8-block",
    recipe: Annotated[Path | None, typer.Option(help="TOML file that says which weights stay plain.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Sample tokens for modelopt-fp8-tensor: a text, or JSON lists of ids.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, no progress.")] = False,
) -> int:
    """Writes a quantized checkpoint that vLLM, SGLang, TensorRT-LLM or transformers read; it can be built from, too."""
    with interrupt.leaves_at_once():
        from latentrt.export import publishing, samples
        from latentrt.export import recipe as recipes
        from latentrt.export.checkpoint import Checkpoint

        publishing.check(form)
        from latentrt.export.publishing import write

        chosen = recipes.read(recipe) if recipe else None
        published = publishing.find(form)
        write.check(published, calibration)
        opened = Checkpoint(checkpoint)
        opened.check()
        tokens = samples.read_samples(calibration, opened) if calibration else None
        from latentrt.export.progress import Report

    layers = opened.config.num_hidden_layers if tokens else 0
    with Report(quiet=as_json) as report:
        for note in opened.notes:
            report.note(note)
        with report.stage(f"export {form}", len(opened.expected_tensors()) + layers) as advance:
            count = write.write(opened, published, out, chosen, advance, tokens)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    if as_json:
        print(json.dumps({"out": str(out), "format": form, "tensors": count, "bytes": size, "notes": report.notes}))
    else:
        print(f"{out}: {count} tensors, {published.storage}, {size / 1e6:.1f} MB")
    return 0
