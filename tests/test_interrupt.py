"""Ctrl-C before a command has begun: one line, exit status 130, no traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from latentrt import interrupt

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("command", "package"), [
    ("build.py", "typer"), ("build.py examples/tiny-deepseek-v2 --out B", "torch"),
    ("-m latentrt generate B --prompt x", "numpy"),
    ("-m latentrt info B", "rich"), ("-m latentrt validate B --reference C", "torch"),
])  # fmt: skip
def test_during_imports(command, package):
    """-X importtime says what has been imported: Ctrl-C comes after the package's first module, so within the package."""
    call = [sys.executable, "-X", "importtime", *command.split()]
    child = subprocess.Popen(call, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    said = []
    for line in child.stderr:
        module = line.rsplit("|")[-1].strip()
        if not line.startswith("import time:"):
            said.append(line)
        elif module.split(".")[0] == package:
            child.send_signal(signal.SIGINT)
            package = None
    assert (child.wait(), said) == (interrupt.STATUS, ["interrupted\n"])


def test_ctrl_c_is_pythons_own_again_after_the_imports():
    with interrupt.leaves_at_once():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_program_that_ignores_ctrl_c_goes_on_doing_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupt.leaves_at_once():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_the_demo(tmp_path):
    """As in a terminal: Ctrl-C goes to the command that runs, too."""
    command = [sys.executable, "examples/demo.py", "--out", str(tmp_path / "demo")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    while not child.stdout.readline().startswith("$"):
        pass
    os.killpg(child.pid, signal.SIGINT)
    _, err = child.communicate()
    assert child.returncode == interrupt.STATUS and err.splitlines()[-1] == "the demo was interrupted"
    assert "demo.py" not in err  # no traceback of its own
