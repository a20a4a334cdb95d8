"""The command that compiles and judges kernels."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from latentrt import interrupt
from latentrt.errors import UserError
from latentrt.plugins import architecture


def kernels(
    every: Annotated[bool, typer.Option("--all", help="For every architecture.")] = False,
    arch: Annotated[list[int] | None, typer.Option(help="A compute capability, such as 89 (repeatable).")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
    cache: Annotated[Path | None, typer.Option(help="Folder of compiled kernels.")] = None,
) -> int:
    """Compiles the kernels of DeepSeek-V2 and V2-Lite; lists what they take. Exit code 1 if one is unfit or slow."""
    if find_spec("triton") is None:
        raise UserError("Triton, which compiles kernels, is not installed; pip install triton")
    capabilities = tuple(architecture.ARCHITECTURES if every else dict.fromkeys(arch or ()))
    if not capabilities:
        raise typer.BadParameter("name architectures with --arch, or give --all")
    for capability in capabilities:
        try:
            architecture.get(capability)
        except ValueError as error:
            raise typer.BadParameter(f"--arch: {error}") from None
    with interrupt.leaves_at_once():
        from latentrt.plugins.launch.report import report

    return 1 if report(capabilities, jobs, cache) else 0
