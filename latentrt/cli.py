"""The command `latentrt`: what its commands share. They are in latentrt/commands/ and import what they need when they run."""

import json
import os
import sys
import traceback
from typing import Annotated

from latentrt import __version__, interrupt

with interrupt.leaves_at_once():
    import typer

    from latentrt.commands import build, compare, export, kernels, plan, rank, run, serve, simulate, validate
    from latentrt.errors import UserError

USER_ERROR, DEFECT, BROKEN_PIPE = 2, 3, 141  # exit statuses
VERSIONED = ("torch", "onnx", "onnxruntime", "tensorrt-rtx-cu13", "tensorrt-cu13", "triton", "transformers", "cuda-bindings")
UsageError = typer.BadParameter.__bases__[0]  # of the click that typer carries inside

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
COMMANDS = (
    plan.plan, simulate.simulate, rank.rank, build.build, run.info, run.generate, run.chat, run.logits, serve.serve,
    validate.validate, compare.record, compare.compare, validate.dequantize, export.export, kernels.kernels,
)  # fmt: skip
for _command in COMMANDS:
    app.command()(_command)


def _show_versions(asked: bool) -> None:
    """The versions that decide what can be built and run here."""
    if not asked:
        return
    import platform
    from importlib.metadata import PackageNotFoundError, version

    print(f"latentrt {__version__}\nPython {platform.python_version()}")
    for name in VERSIONED:
        try:
            print(name, version(name))
        except PackageNotFoundError:
            print(name, "is not installed")
    raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_versions, is_eager=True, help="Versions of this and what it uses.")
    ] = False,
) -> None:
    """DeepSeek-V2-family checkpoints as compiled engines: build, run, validate."""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit status: 2 for an error that the user can mend, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = app(arguments, prog_name="latentrt", standalone_mode=False) or 0
        if status == interrupt.STATUS and arguments[:1] != ["build"]:  # what typer makes of KeyboardInterrupt
            _say("interrupted")
        return status
    except UsageError as error:
        if not arguments:  # the help was shown
            return USER_ERROR
        named = arguments[0] in [command.__name__ for command in COMMANDS]
        command = f"latentrt {arguments[0]}" if named else "latentrt"
        return _fail(f"{error.format_message().rstrip('.')}; see {command} --help", "UsageError", arguments)
    except UserError as error:
        return _fail(str(error), type(error).__name__, arguments)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on; nothing to complain about
        return BROKEN_PIPE
    except OSError as error:
        return _fail(f"{error.filename or 'writing'}: {error.strerror or error}", "OSError", arguments)
    except (typer.Abort, KeyboardInterrupt):
        _say("interrupted")
        return interrupt.STATUS
    except Exception:  # a defect of ours is no verdict on an engine: anything but the exit status of a failed validation
        traceback.print_exc()
        return DEFECT


def run() -> None:
    """The entry point of the installed command."""
    sys.exit(main())


def _fail(message: str, kind: str, arguments: list[str]) -> int:
    if "--json" in arguments:
        print(json.dumps({"error": message, "kind": kind}))
    _say(f"error: {message}", "red")
    return USER_ERROR


def _say(text: str, style: str = "") -> None:
    from rich.console import Console

    Console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)
