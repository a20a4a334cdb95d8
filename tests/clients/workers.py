"""Clients in processes of their own, with their own packages: a call is a line of JSON, and so is what comes back."""

import json
import os
import queue
import shutil
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
NPM = HERE / "npm"
DEADLINE = 120  # seconds: only a defect takes so long
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "LANGSMITH_TRACING": "false",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True", "TOKENIZERS_PARALLELISM": "false", "NO_PROXY": "*",
            "TQDM_DISABLE": "1"}  # fmt: skip
_OWN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "OPENAI_API_KEY", "OPENAI_BASE_URL", "NODE_OPTIONS")


def environment(more: dict[str, str] = {}) -> dict[str, str]:
    """For a client: nothing of this interpreter's, and nothing of a network."""
    return {name: value for name, value in os.environ.items() if name not in _OWN} | _OFFLINE | more


def needed(path: Path) -> Path:
    """Skips a test whose clients are not installed."""
    if not path.exists():
        pytest.skip(f"{path} is not there; make clients")
    return path


class ClientError(Exception):
    """What a client raised. kinds: its class and those above it; the rest is there if the client tells it."""

    def __init__(self, kinds, message, status=None, code=None, param=None, retry_after=None):
        super().__init__(f"{kinds[0]}: {message}")
        self.kinds, self.message, self.status, self.code, self.param = kinds, message, status, code, param
        self.retry_after = retry_after


@dataclass
class Worker:
    """A client's process. `call` runs one of its functions."""

    command: list[str]
    log: Path
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8",
                env=environment(self.variables),
            )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def call(self, name: str, *args, **kwargs):
        """What the function gives. Raises ClientError."""
        print(json.dumps({"name": name, "args": args, "kwargs": kwargs}), file=self._process.stdin, flush=True)
        try:
            line = self._lines.get(timeout=DEADLINE)
        except queue.Empty:
            line = ""
        if not line:
            self._process.kill()
            pytest.fail(f"{' '.join(self.command)} gave no answer to {name}: {self.log.read_text()[-2000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise ClientError(**answer["error"])
        return answer["value"]

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(20)
        finally:
            self._process.kill()


def python_worker(calls: str, folder: Path) -> Worker:
    """A process of the clients' Python that has the functions of scripts/CALLS.py."""
    return Worker([str(needed(PYTHON)), str(HERE / "scripts" / "worker.py"), calls], folder / f"{calls}.log")


def node_worker(calls: str, folder: Path, variables: dict[str, str] = {}) -> Worker:
    """A process of Node.js that has the functions of npm/CALLS.mjs."""
    node = needed(Path(shutil.which("node") or "node"))
    needed(NPM / "node_modules" / "installed")
    return Worker([str(node), str(NPM / "worker.mjs"), f"./{calls}.mjs"], folder / f"{calls}.log", variables)
