"""One rank's part of a TensorRT target, by stand-ins for the package, the GPU and NCCL."""

import numpy as np
import pytest

from latentrt.plugins.step_graph import FIRST_EXPERT
from latentrt.runtime.backends.base import BackendOptions, SequenceRows, pack
from latentrt.runtime.backends.padding import StepShape
from latentrt.runtime.backends.tensorrt.backend import TensorRtBackend
from latentrt.runtime.errors import BundleError, EngineError
from latentrt.runtime.ranks.lockstep import IDLE
from tests.runtime import tensorrt_fakes as fakes

RANKS = 2


class Communicator:
    capsule = "the ranks"


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    return fakes.Builder(tmp_path / "bundle").write(ranks=RANKS, shared_weights=["a.weight"])


@pytest.fixture
def engine(device, monkeypatch):
    engine = fakes.FakeEngine(device, extra=[FIRST_EXPERT])
    fakes.install(monkeypatch, fakes.package(engine))
    device.launcher.join = lambda index, communicator: None
    monkeypatch.setattr("latentrt.runtime.backends.tensorrt.backend._plugins", lambda *_: (None, device.launcher))
    return engine


def load(bundle, rank: int) -> TensorRtBackend:
    name, target = bundle.target(None)
    return TensorRtBackend(bundle, name, target, BackendOptions(rank=rank, cache_tokens=640), Communicator())


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_rank_holds_its_own_experts_and_all_of_the_rest(bundle, device, engine, rank):
    backend = load(bundle, rank)
    shard = bytes(range(256)) * 4
    tensors = {name: shard[64 + 128 * i :][:128] for i, name in enumerate(fakes.WEIGHTS)}
    half = {"a.weight": tensors["a.weight"][64 * rank :][:64], "b.weight": tensors["b.weight"]}
    for name, content in half.items():
        address = backend._weights[name]
        assert device.uploaded[address] == content and address % 256 == 0
    assert np.frombuffer(device.uploaded[backend._weights[FIRST_EXPERT]], np.int32).tolist() == [8 * rank]


def test_every_context_joins_the_ranks_when_it_is_made(bundle, engine):
    load(bundle, 0)
    assert len(engine.contexts) == 2 and {c.communicator for c in engine.contexts} == {"the ranks"}


def test_a_pass_has_the_shape_that_all_ranks_agreed_on(bundle, device, engine):
    """Captured on padding, then replayed: also where this rank has nothing to do."""
    backend = load(bundle, 1)
    assert backend.two_passes
    result = backend.step_padded(IDLE[0], StepShape(3, 3, 3, 5), decoding=True)
    assert result.logits().shape == (0, fakes.VOCAB)
    _, _, shapes, *_ = next(entry for entry in device.log if entry[0] == "execute")
    assert shapes["input_ids"] == (4,) and shapes["block_table"] == (4, 8) and shapes["logit_rows"] == (4,)
    before = len(engine.contexts)
    backend.step_padded(fakes.decode_batch(2), StepShape(3, 3, 3, 5), decoding=True)
    assert len(engine.contexts) == before, "the same shape: the same graph"


def test_a_prompts_pass_captures_nothing(bundle, device, engine):
    backend = load(bundle, 0)
    one_row = pack([SequenceRows([7], 0, [0])], np.array([[1]]))
    backend.step_padded(one_row, StepShape(20, 1, 1, 1), decoding=False)
    (_, profile, shapes, *_) = [entry for entry in device.log if entry[0] == "execute"][-1]
    assert profile == 1 and shapes["input_ids"] == (32,), "one row alone would decode; the others read 20"


def test_what_cannot_be_captured_is_an_error(bundle, engine, monkeypatch):
    """Other ranks would capture, and wait for this one."""
    monkeypatch.setattr(fakes.RtxContext, "capturable", False)
    with pytest.raises(EngineError, match="cannot be captured"):
        load(bundle, 0).step_padded(fakes.decode_batch(1), StepShape(1, 1, 1, 1), decoding=True)


def test_a_machine_without_gpus_is_refused_before_anything_is_loaded(tmp_path):
    from latentrt.runtime import backends

    bundle = fakes.Builder(tmp_path / "bundle").write(ranks=RANKS, shared_weights=["a.weight"])
    with pytest.raises(BundleError, match=r"rank \d needs GPU \d and NCCL: .*use backend 'torch' with device 'cpu'"):
        backends.load(bundle)
