"""A fuzzer that reads the server's own OpenAPI."""

import re
import subprocess

import pytest

from tests.clients.workers import PYTHON, environment, needed


@pytest.mark.slow
def test_a_fuzzer_finds_nothing(served, tmp_path):
    """schemathesis on the server's own OpenAPI: no status 500, no answer that does not fit its schema."""
    strict = "unsupported_method,positive_data_acceptance"  # OpenAPI cannot say all rules
    command = [str(needed(PYTHON).parent / "st"), "run", f"{served.url}/openapi.json", "--max-examples", "25", "--seed", "3",
               "--phases", "fuzzing", "--exclude-checks", strict]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) generated", done.stdout)[1]) > 100
