"""`latentrt serve` in a process of its own, as users start it."""

import os
import re
import select
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

from tests.clients.workers import ROOT

DEADLINE = 60  # seconds: only a defect takes so long
GAUGES = "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"


class Served:
    """A server on a port that was free. `at`: what OpenAI's clients need of it."""

    def __init__(self, bundle: Path, log: Path, *options: str, key: str = "none"):
        command = [sys.executable, "-m", "latentrt", "serve", str(bundle), "--port", "0", "--threads", "1",
                   "--served-model-name", "example", *options]  # fmt: skip
        self.log, self.model = log, "example"
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with log.open("w") as errors:
            streams = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
            self.process = subprocess.Popen(command, env=environment, cwd=ROOT, **streams)
        self.url = re.search(r"http://[^/]+", self._first_line())[0]
        self.at = {"base_url": f"{self.url}/v1", "api_key": key, "max_retries": 0}

    def _first_line(self) -> str:
        ready, _, _ = select.select([self.process.stdout], [], [], DEADLINE)
        line = self.process.stdout.readline() if ready else ""
        assert line.startswith("serving example at http://"), (line, self.log.read_text()[-2000:])
        return line

    def gauges(self) -> list[float]:
        """What /metrics says of requests that run, of those that wait, and of the cache in use."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=DEADLINE) as response:
            text = response.read().decode()
        return [float(re.search(rf'^vllm:{name}{{model_name="example"}} (\S+)$', text, re.M)[1]) for name in GAUGES]

    def stop(self) -> int:
        """Ends it as an operator would; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(DEADLINE)
        finally:
            self.process.kill()
            self.process.stdout.close()
