"""A server in a process of its own, and an interpreter that has other people's clients."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import latentrt

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "NO_PROXY": "*",
         "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}  # fmt: skip


@pytest.fixture(scope="session")
def url(example_bundle):
    """The example model, served by the command; SIGTERM must end it with status 0."""
    command = [sys.executable, "-m", "latentrt", "serve", str(example_bundle), "--port", "0", "--served-model-name", "tiny"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        yield child.stdout.readline().split()[3].removesuffix("/v1")
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0


@pytest.fixture(scope="session")
def engine(example_bundle):
    """The same bundle, for what answers must be."""
    with latentrt.load(example_bundle) as engine:
        yield engine


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Callable[..., dict]:
    """Runs code with the clients' interpreter: it gets `url` and puts what it found into `found`, which comes back."""
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON} is not there; make .venv-clients/installed")
    folder = tmp_path_factory.mktemp("clients")

    def run(code: str, url: str) -> dict:
        script = f"import json\nurl, found = {url!r}, {{}}\n{code}\nprint('FOUND' + json.dumps(found))"
        done = subprocess.run([PYTHON, "-c", script], cwd=folder, capture_output=True, text=True, env=os.environ | QUIET)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.rpartition("FOUND")[2])

    return run
