"""Kernels run in Triton's interpreter here: it must be asked for before Triton is imported."""

import os
import sys

import pytest

os.environ["TRITON_INTERPRET"] = "1"

if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
    raise pytest.UsageError("Triton was imported before tests/plugins/conftest.py could ask for its interpreter")
