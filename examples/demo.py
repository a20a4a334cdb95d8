"""The whole pipeline on the example model: build, look, generate, chat, validate. Called by `make demo`.

Each step is a command that a user could type; it is shown before it runs.
"""

import argparse
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "Hello! Who are you?"
INTERRUPTED, PATIENCE = 130, 10  # exit status; seconds that an interrupted command has to put things in order


def step(title: str, *command: str, typed: str | None = None) -> None:
    """Shows and runs one command, `typed` on its standard input; leaves with its exit status if it fails."""
    shown = " ".join(f'"{c}"' if " " in c or not c else c for c in command)
    print(f"\n{title} {'─' * (99 - len(title))}\n$ {f'echo {typed!r} | ' if typed else ''}python {shown}", flush=True)
    status = run([sys.executable, *command], typed)
    if status:
        print(f"the command above failed with exit status {status}", file=sys.stderr)
        sys.exit(status)


def run(command: list[str], typed: str | None) -> int:
    """Exit status of a command. Ctrl-C reaches the command as well, which is given time to leave."""
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE if typed else None)
    try:
        process.communicate(f"{typed}\n" if typed else None)
    except KeyboardInterrupt:
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        process.kill()
        raise
    return process.returncode


def main() -> None:
    """Builds a bundle for the CPU, generates, chats one turn, validates, and says where the report is."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--checkpoint", default="examples/tiny-deepseek-v2", help="a Hugging Face DeepSeek-V2 checkpoint")
    parser.add_argument("--out", default="demo", help="folder for the bundle and the report")
    given, start = parser.parse_args(), time.monotonic()
    bundle, report = f"{given.out}/bundle", f"{given.out}/report"
    step("Build", "-m", "latentrt", "build", given.checkpoint, "--target", "cpu", "--precision", "int8", "--out", bundle)
    step("Bundle", "-m", "latentrt", "info", bundle)
    step("Generate", "-m", "latentrt", "generate", bundle, "--prompt", "def read_file(path", "--max-new-tokens", "64")
    step("Chat", "-m", "latentrt", "chat", bundle, typed=QUESTION)
    step("Validate", "-m", "latentrt", "validate", bundle, "--reference", given.checkpoint, "--report", report)
    print(f"\ndone in {time.monotonic() - start:.0f} s: bundle in {bundle}, report in {report}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("the demo was interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
