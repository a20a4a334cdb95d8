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


# Mean KL to transformers of this random model: measured 2.7e-4, 2.1e-4, 2.1e-4 and 2.1e-3 nats; doubled for other draws. The
# faults below give 0.07.
PACKED_KL = {"fp8": 6e-4, "int6": 5e-4, "int6r": 5e-4, "int4": 5e-3}
PACKED = {"kv_lora_rank": 96, "qk_rope_head_dim": 8, "attention_bias": True}  # 96: three blocks of rotation


@pytest.fixture(scope="session")
def packable(tmp_path_factory) -> Path:
    """Gains of the latent's norm are far from 1, or leaving them out would not be seen."""
    folder = checkpoints.write(tmp_path_factory.mktemp("packable"), seed=4, **PACKED)

    def change(tensors: dict) -> None:
        for name in (n for n in tensors if n.endswith("kv_a_layernorm.weight")):
            tensors[name] = torch.rand(tensors[name].shape, generator=torch.Generator().manual_seed(2)) * 3 + 0.1

    checkpoints.edit_tensors(folder, change)
    return folder
