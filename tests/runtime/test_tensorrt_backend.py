"""The TensorRT backend without a GPU: what it refuses, and what it asks of the package and the driver, by stand-ins."""

from types import SimpleNamespace

import numpy as np
import pytest

from runtime import backends
from runtime.backends import cuda_device, padding
from runtime.backends.base import SequenceRows, StepBatch
from runtime.bundle import BundleError
from runtime.errors import EngineError, RequestError
from tests.runtime import tensorrt_fakes as fakes
from tests.runtime.tensorrt_fakes import TABLE, decode_batch, install


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    return fakes.Builder(tmp_path / "bundle").write()


@pytest.fixture
def backend(bundle, device, monkeypatch):
    install(monkeypatch, fakes.package(fakes.FakeEngine(device)))
    return backends.load(bundle, "sm89", cache_tokens=640)


def executed(device) -> list[tuple]:
    return [entry for entry in device.log if entry[0] == "execute"]


# refusals


def test_no_gpu(bundle):
    """This machine has none; with one, the wrong kind is refused just so."""
    with pytest.raises(BundleError, match=r"needs a GPU of compute capability sm89|was built for sm89"):
        backends.load(bundle, "sm89")


def test_other_gpu(bundle, device):
    device.capability = 90
    with pytest.raises(BundleError, match=r"built for sm89, this GPU \(Fake GPU\) is sm90"):
        backends.load(bundle, "sm89")


def test_package_missing(tmp_path, device, monkeypatch):
    bundle = fakes.Builder(tmp_path / "full").write(backend="tensorrt")
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(BundleError, match=r"needs tensorrt, which is not installed .* pip install tensorrt-cu13==1\.7\.1"):
        backends.load(bundle, "sm89")


def test_package_of_another_version(bundle, device, monkeypatch):
    install(monkeypatch, fakes.package(fakes.FakeEngine(device), "1.8.0.1"))
    with pytest.raises(BundleError, match=r"built with tensorrt_rtx 1\.7\.1\.116, installed is 1\.8\.0\.1"):
        backends.load(bundle, "sm89")


@pytest.mark.parametrize("suffix", [".plan", ".safetensors", ".cubin"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_files(bundle, device, suffix, damage):
    (path,) = (bundle.path / "files").glob(f"*{suffix}")
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=rf"{path.name}: (missing|has \d+ bytes)"):
        backends.load(bundle, "sm89")


def test_changed_kernel(bundle, device, monkeypatch):
    install(monkeypatch, fakes.package(fakes.FakeEngine(device)))
    (path,) = (bundle.path / "files").glob("*.cubin")
    path.write_bytes(b"machine cod3")
    with pytest.raises(BundleError, match=r"kernel moe_route\.route does not fit its manifest"):
        backends.load(bundle, "sm89")


def test_refused_plan(bundle, device, monkeypatch):
    install(monkeypatch, fakes.package(None))
    with pytest.raises(BundleError, match=r"refuses this plan"):
        backends.load(bundle, "sm89")


def test_plan_with_other_tensors(bundle, device, monkeypatch):
    install(monkeypatch, fakes.package(fakes.FakeEngine(device, extra=["c.weight"])))
    with pytest.raises(BundleError, match=r"only in the plan \['c\.weight'\]"):
        backends.load(bundle, "sm89")


def test_engine_that_refuses_a_step(backend, device):
    backend.runner.contexts["prefill"].execute_async_v3 = lambda stream: False
    with pytest.raises(EngineError, match="refuses to run a step"):
        backend.step(StepBatch.of([SequenceRows([1, 2], 0, [1])], TABLE[:1]))


def test_step_larger_than_the_profiles(backend):
    with pytest.raises(RequestError, match="129 rows, the engine was built for 128"):
        backend.step(StepBatch.of([SequenceRows(range(129), 0, [0])], TABLE[:1]))


# what is bound


def test_everything_is_bound_once(backend, device):
    for name, index in (("decode", 0), ("prefill", 1)):
        context = backend.runner.contexts[name]
        assert context.profile == index
        for cache, address in zip(fakes.CACHES, backend.caches, strict=True):
            assert context.addresses[cache] == context.addresses[f"{cache}.updated"] == address
            assert context.shapes[cache] == (11, fakes.PAGE, fakes.WIDTH), "640 tokens and the scratch page"
            assert device.blocks[address] == 11 * fakes.PAGE * fakes.WIDTH * 2
            assert ("zero", address, device.blocks[address]) in device.log
        (shard,) = device.uploaded
        assert [context.addresses[w] - shard for w in fakes.WEIGHTS] == [64, 192]
        assert device.blocks[context.addresses["logits"]] >= 8 * fakes.VOCAB * 4
    assert next(iter(device.launcher.kernels)).function == "route"


def test_decode_is_captured_once_and_replayed(backend, device):
    logits = backend.step(decode_batch(3))
    assert logits.shape == (3, fakes.VOCAB) and logits.dtype == np.float32
    runs = executed(device)
    assert len(runs) == 3 and all(r[1] == 0 for r in runs), "two to warm up, one captured; decode's profile"
    shapes, addresses = runs[-1][2], runs[-1][3]
    assert {n: shapes[n] for n in fakes.BATCH} == padding.StepShape(4, 4, 4, 4).sizes()
    assert set(addresses) == {*fakes.BATCH, *fakes.CACHES, *(f"{c}.updated" for c in fakes.CACHES), *fakes.WEIGHTS,
                              "logits", "last_hidden"}  # fmt: skip
    assert all(a % 16 == 0 for a in addresses.values())
    zeroed = next(i for i, e in enumerate(device.log) if e[:2] == ("zero", addresses["input_ids"]))
    assert zeroed < device.log.index(runs[0]), "captured on padding alone: nothing is written to the cache"
    device.log.clear()
    backend.step(decode_batch(4))
    assert [e[0] for e in device.log] == ["upload", "launch", "download"]


def test_padding_of_a_decode_step(backend, device):
    batch = decode_batch(3)
    backend.step(batch)
    (uploaded,) = [e[2] for e in device.log if e[0] == "upload"]
    shape = padding.StepShape(4, 4, 4, 4)
    offsets, sizes = shape.offsets()[0], shape.sizes()
    found = {n: uploaded[o : o + int(np.prod(sizes[n]))].reshape(sizes[n]) for n, o in offsets.items()}
    assert found["input_ids"].tolist() == [5, 6, 7, 0] and found["num_tokens"].tolist() == [3]
    assert found["query_starts"].tolist() == [0, 1, 2, 3, 3], "the fourth sequence is empty"
    assert found["cached_lengths"].tolist() == [0, 3, 6, 0] and found["block_table"][3].tolist() == [0] * 4
    assert np.array_equal(found["block_table"][:3], TABLE)


def test_prefill_is_enqueued_in_few_shapes(backend, device):
    for rows in (33, 50, 64):
        backend.step(StepBatch.of([SequenceRows(range(rows), 0, [rows - 1]), SequenceRows([1], 3, [0])], TABLE[:2]))
    backend.step(StepBatch.of([SequenceRows([1, 2], 0, [])], TABLE[:1, :3]))
    runs = executed(device)
    assert all(r[1] == 1 for r in runs) and len(runs) == 4, "prefill's profile, no captures"
    assert [r[2]["input_ids"] for r in runs] == [(64,), (64,), (128,), (16,)]
    assert runs[0][2]["block_table"] == (2, 4) and runs[3][2]["block_table"] == (1, 4) and runs[3][2]["logit_rows"] == (1,)


def test_without_capture(bundle, device, monkeypatch):
    install(monkeypatch, fakes.package(fakes.FakeEngine(device)))
    backends.load(bundle, "sm89", cache_tokens=640, capture=False).step(decode_batch(2))
    assert len(executed(device)) == 1 and ("begin capture",) not in device.log


def test_engine_that_cannot_be_captured(backend, device):
    backend.runner.contexts["decode"].is_stream_capturable = lambda stream: False
    for _ in range(2):
        backend.step(decode_batch(2))
    assert ("begin capture",) not in device.log and len(executed(device)) == 2 + 2, "two to warm up, then every step"


# TensorRT-RTX's runtime cache


def test_runtime_cache_is_kept(bundle, device, monkeypatch):
    states = []
    for _ in range(2):
        engine = fakes.with_runtime_cache(fakes.FakeEngine(device))
        install(monkeypatch, fakes.package(engine))
        backend = backends.load(bundle, "sm89", cache_tokens=640)
        assert backend.runner.contexts["decode"].config is not None
        backend.step(decode_batch(1))
        states.append((backend.load_seconds["runtime_cache"], engine.cache.given))
    assert states == [("cold", None), ("warm", b"compiled")]
    (cache,) = backend.runtime_caches.values()
    assert cache.path.read_bytes() == b"compiled"
    assert "Fake_GPU-13000-1.7.1.116-" in cache.path.name
    assert {"plan", "weights", "contexts", "first_step"} <= set(backend.load_seconds)


def test_runtime_cache_that_cannot_be_written(bundle, device, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "file"))
    install(monkeypatch, fakes.package(fakes.with_runtime_cache(fakes.FakeEngine(device))))
    backends.load(bundle, "sm89", cache_tokens=640).step(decode_batch(1))
    assert "the next load compiles again" in capsys.readouterr().err


def test_cache_size_keeps_within_the_profiles(bundle, device, monkeypatch):
    install(monkeypatch, fakes.package(fakes.FakeEngine(device)))
    assert backends.load(bundle, "sm89", cache_tokens=1 << 30).num_pages == 100
    assert backends.load(bundle, "sm89", cache_tokens=1).num_pages == 2


def test_driver_errors_are_named():
    class Driver:
        CUresult = SimpleNamespace(CUDA_SUCCESS=0)

        def cuMemAlloc(self, size):  # noqa: N802 - the driver's name
            return (2, None)

    device = cuda_device.Device.__new__(cuda_device.Device)
    device._driver, device._memory = Driver(), []
    with pytest.raises(cuda_device.CudaError, match="cuMemAlloc: 2"):
        device.allocate(1)


def test_chunks_are_as_long_as_a_step(backend):
    assert backend.prefill_chunk == backend.target.limits.max_batch_tokens == 128
