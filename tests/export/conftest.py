"""What the export tests share."""

from pathlib import Path

import pytest
import torch

from tests import checkpoints
from tests.builds import locked

torch.set_num_threads(1)  # models this small only lose by threads, fifty-fold where cores are shared


@pytest.fixture(scope="session")
def small_checkpoint(shared) -> Path:
    """A random float32 checkpoint of tests.checkpoints.CONFIG; read-only."""
    folder = shared / "small_checkpoint"
    with locked(shared / "small_checkpoint.lock"):
        if not folder.exists():
            checkpoints.write(folder, seed=11)
    return folder
