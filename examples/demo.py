"""The whole pipeline on the example model: build, look, generate, chat, validate. Called by `make demo`.

Each step is a command that a user could type; it is shown before it runs.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "Hello! Who are you?"
console = Console(highlight=False)


def step(title: str, *command: str, typed: str | None = None) -> None:
    """Shows and runs one command, `typed` on its standard input; leaves with its exit status if it fails."""
    shown = " ".join(f'"{c}"' if " " in c or not c else c for c in command)
    console.rule(f"[bold]{title}", align="left")
    console.print(f"[dim]$ {f'echo {typed!r} | ' if typed else ''}python {shown}")
    done = subprocess.run([sys.executable, *command], cwd=ROOT, text=True, input=f"{typed}\n" if typed else None)
    if done.returncode:
        console.print(f"[red]the command above failed with exit status {done.returncode}")
        sys.exit(done.returncode)


def main(
    checkpoint: Annotated[str, typer.Option(help="A Hugging Face DeepSeek-V2 checkpoint.")] = "examples/tiny-deepseek-v2",
    out: Annotated[str, typer.Option(help="Folder for the bundle and the report.")] = "demo",
) -> None:
    """Builds a bundle for the CPU, generates, chats one turn, validates, and says where the report is."""
    start = time.monotonic()
    bundle, report = f"{out}/bundle", f"{out}/report"
    step("Build", "build.py", checkpoint, "--target", "cpu", "--precision", "int8", "--out", bundle)
    step("Bundle", "-m", "runtime", "info", bundle)
    step("Generate", "-m", "runtime", "generate", bundle, "--prompt", "def read_file(path", "--max-new-tokens", "64")
    step("Chat", "-m", "runtime", "chat", bundle, typed=QUESTION)
    step("Validate", "-m", "validation", bundle, "--reference", checkpoint, "--report", report)
    console.rule()
    console.print(f"done in {time.monotonic() - start:.0f} s: bundle in {bundle}, report in {report}")


if __name__ == "__main__":
    typer.run(main)
