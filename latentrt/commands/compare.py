"""Commands that record a run, and hold any two sources of next-token probabilities to each other."""

import json
from pathlib import Path
from typing import Annotated

import typer

from latentrt import interrupt
from latentrt.commands.options import BackendName, BundlePath, Device, TargetName
from latentrt.commands.validate import progress_bar

Text = Annotated[Path | None, typer.Option(help="Text to run on; held_out.txt of the checkpoint by default.")]
Tokens = Annotated[int, typer.Option("--tokens", help="How many tokens to run on.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, no progress.")]


def record(
    bundle: BundlePath,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, .safetensors.")],
    target: TargetName = None, text: Text = None, count: Tokens = 4096, backend: BackendName = None, device: Device = "auto",
    as_json: Json = False,
) -> int:  # fmt: skip
    """Records a run of an engine, for latentrt validate --recorded and latentrt compare on any machine."""
    with interrupt.leaves_at_once():
        from latentrt.runtime.bundle.reader import Bundle
        from latentrt.validation import record as recorder
        from latentrt.validation.stages.executor import Executor

    opened = Bundle(bundle)
    executor = Executor(opened, *opened.target(target), backend, device)
    with progress_bar(recorder.STAGES, "recorded", quiet=as_json) as step:
        facts = recorder.record(executor, text, count, out, step)
    size = out.stat().st_size
    if as_json:
        print(json.dumps({"out": str(out), "bytes": size} | facts))
    else:
        print(f"{out}: {size / 1e6:.1f} MB; {facts['executed']['summary']}")
    return 0


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="What the other is held to: see the README for what it may be.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The other.")],
    text: Text = None, count: Tokens = 4096,
    ids: Annotated[Path | None, typer.Option(help="Instead of a text: a JSON file, a list of token-id lists.")] = None,
    backend: BackendName = None, device: Device = "auto", as_json: Json = False,
) -> int:  # fmt: skip
    """How far two are apart on the same tokens: bundles, checkpoints, GGUF files, recorded runs, servers."""
    with interrupt.leaves_at_once():
        from rich.console import Console

        from latentrt.validation.report import difference as report
        from latentrt.validation.sources import SourceOptions
        from latentrt.validation.sources import pair as pairs

    with pairs.opened(first, second, SourceOptions(backend, device)) as pair:
        chosen = pair.tokens(text, ids, count)
        with progress_bar(len(chosen.windows), "compared", quiet=as_json) as step:
            found = pair.compare(chosen, lambda done: step(f"window of {done} tokens"))
        content = report.content(pair, chosen, found)
    if as_json:
        print(json.dumps(content))
    else:
        report.summarize(Console(), content)
    return 0
