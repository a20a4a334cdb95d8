"""Target torch with int4 experts: alone, and shared by two processes."""

import numpy as np
import pytest

import latentrt
from latentrt.export.quantization import BFloat16Int4
from latentrt.runtime.bundle.reader import Bundle
from tests.conftest import EXAMPLE

pytestmark = pytest.mark.slow

RANKS = 1, 2


@pytest.fixture(scope="module")
def bundles(traced, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int4")
    return {n: traced.build_once(f"int4-ranks-{n}", EXAMPLE, folder / str(n), "torch", "int4", ranks=n) for n in RANKS}


def test_ranks_share_elements_and_scales(bundles):
    """Both lie by expert: rows of axis 0 are a rank's."""
    bundle = Bundle(bundles[2])
    _, target = bundle.target()
    tensors = [f"experts.{name}_proj{suffix}" for name in ("gate_up", "down") for suffix in ("", ".scale")]
    names = {f"model.layers.{i}.mlp.{tensor}" for i in range(1, 5) for tensor in tensors}
    assert target.precision == BFloat16Int4.name and set(target.shared_weights) == names


def test_two_processes_give_the_logits_of_one(bundles):
    """A layer's two sums are rounded to bfloat16 before they are added, 8 bits each: as far off as bf16 is from float32."""
    lists, found = [np.random.default_rng(0).integers(3, 4000, size).tolist() for size in (1, 130, 7)], {}
    for ranks, bundle in bundles.items():
        with latentrt.load(bundle, device="cpu", threads=1, cache_tokens=1024) as engine:
            found[ranks] = np.asarray(engine.logits(lists))
    errors = np.linalg.norm(found[2] - found[1], axis=1) / np.linalg.norm(found[1], axis=1)
    assert np.median(errors) <= 0.03 and np.quantile(errors, 0.9) <= 0.1
