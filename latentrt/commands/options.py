"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of the bundle.")]
TargetName = Annotated[str | None, typer.Option(help="Target of the bundle; the only one by default.")]
BackendName = Annotated[str | None, typer.Option("--backend", help="The target's own by default; torch interprets any target.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1 and so on; with --backend torch for any target.")]
Ranks = Annotated[int | None, typer.Option(help="Processes, a GPU each; those that the target was built for by default.")]
