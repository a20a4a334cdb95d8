"""The TensorRT backend without a GPU: what it refuses, and what it asks of the package and the driver, by stand-ins."""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.gpu import engine_cache
from latentrt.runtime import backends
from latentrt.runtime.backends import base, padding
from latentrt.runtime.backends.base import SequenceRows, pack
from latentrt.runtime.backends.tensorrt import device as cuda_device
from latentrt.runtime.backends.tensorrt import runner
from latentrt.runtime.errors import BundleError, EngineError, RequestError
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
    backend.runner.contexts["absorbed", "prefill"].execute_async_v3 = lambda stream: False
    with pytest.raises(EngineError, match="refuses to run a step"):
        backend.step(pack([SequenceRows([1, 2], 0, [1])], TABLE[:1]))


def test_step_larger_than_the_profiles(backend):
    with pytest.raises(RequestError, match="129 rows, the engine was built for 128"):
        backend.step(pack([SequenceRows(range(129), 0, [0])], TABLE[:1]))


# what is bound


def test_everything_is_bound_once(backend, device):
    for name, index in (("decode", 0), ("prefill", 1)):
        context = backend.runner.contexts["absorbed", name]
        assert context.profile == index
        for cache, address in zip(fakes.CACHES, backend.caches, strict=True):
            assert context.addresses[cache] == context.addresses[f"{cache}.updated"] == address
            assert context.shapes[cache] == (11, fakes.PAGE, fakes.WIDTH), "640 tokens and the scratch page"
            assert device.blocks[address] == 11 * fakes.PAGE * fakes.WIDTH * 2
            assert ("zero", address, device.blocks[address], 0) in device.log
        (shard,) = device.uploaded
        assert [context.addresses[w] - shard for w in fakes.WEIGHTS] == [64, 192]
        assert device.blocks[context.addresses["logits"]] >= 8 * fakes.VOCAB * 4
    assert next(iter(device.launcher.kernels)).function == "route"
    last = max(i for i, entry in enumerate(device.log) if entry[0] == "zero")
    assert ("synchronize", 0) in device.log[last:], "the stream of steps does not wait for the default one"


def test_pages_are_copied_in_the_order_of_the_steps(backend, device):
    backend.copy_pages([(2, 5)])
    size = fakes.PAGE * fakes.WIDTH * 2
    copies = [entry for entry in device.log if entry[0] == "copy"]
    assert copies == [("copy", c + 5 * size, c + 2 * size, size, backend.runner.stream) for c in backend.caches]


def test_decode_is_captured_once_and_replayed(backend, device):
    logits = backend.step(decode_batch(3)).logits()
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
    assert device.log[zeroed][3] == backend.runner.stream, "in the order of the steps that warm up"
    device.log.clear()
    backend.step(decode_batch(4)).logits()
    assert [e[0] for e in device.log] == ["synchronize", "upload", "launch", "download"]


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
        backend.step(pack([SequenceRows(range(rows), 0, [rows - 1]), SequenceRows([1], 3, [])], TABLE[:2]))
    backend.step(pack([SequenceRows([1, 2], 0, [])], TABLE[:1, :3]))
    runs = executed(device)
    assert all(r[1] == 1 for r in runs) and len(runs) == 4, "prefill's profile, no captures"
    assert [r[2]["input_ids"] for r in runs] == [(64,), (64,), (128,), (16,)]
    assert runs[0][2]["block_table"] == (2, 4) and runs[3][2]["block_table"] == (1, 4) and runs[3][2]["logit_rows"] == (1,)


def test_prompts_beside_decoding_are_a_pass_of_their_own(backend, device):
    """What decodes replays its graph; logits of both passes lie side by side in one pinned buffer."""
    rows = [SequenceRows([1], 3, [0]), SequenceRows(range(33), 0, [32]), SequenceRows([2], 70, [0])]
    backend.step(pack(rows, TABLE))
    device.log.clear()
    logits = backend.step(pack(rows, TABLE)).logits()
    happened = [e[0] for e in device.log if e[0] != "synchronize"]
    assert happened == ["upload", "execute", "download", "upload", "launch", "download"]
    assert [e[2] for e in device.log if e[0] == "download"] == [(1, fakes.VOCAB), (2, fakes.VOCAB)]
    (prompt,) = executed(device)
    assert prompt[1] == 1 and prompt[2]["input_ids"] == (64,) and prompt[2]["block_table"] == (1, 1)
    assert logits.shape == (3, fakes.VOCAB) and (logits == 1.5).all()


def test_logits_leave_through_one_pinned_buffer(backend):
    first, second = (backend.step(decode_batch(n)).logits() for n in (2, 3))
    assert np.shares_memory(first, backend.runner._logits) and np.shares_memory(second, backend.runner._logits)


def test_of_captured_shapes_the_last_used_are_kept(backend, device, monkeypatch):
    monkeypatch.setattr(runner, "GRAPHS", 2)
    freed = []
    monkeypatch.setattr(device, "free_graph", freed.append, raising=False)
    for count in (1, 2, 1, 3):
        backend.step(decode_batch(count))
    (graph,) = freed
    assert [shape.rows for shape in backend.runner._graphs] == [1, 4]
    assert graph not in [g for g, _ in backend.runner._graphs.values()]


@pytest.mark.parametrize("answer", [None, "", "latent_cache.0"])
def test_caches_that_a_plan_would_write_elsewhere(bundle, device, monkeypatch, answer):
    """No alias is none: the output is bound to the input's memory. Another one is refused."""
    engine = fakes.FakeEngine(device)
    engine.get_aliased_input_tensor = lambda name: answer
    install(monkeypatch, fakes.package(engine))
    if answer:
        with pytest.raises(BundleError, match=r"writes latent_cache.1.updated to the memory of latent_cache.0"):
            backends.load(bundle, "sm89", cache_tokens=640)
    else:
        loaded = backends.load(bundle, "sm89", cache_tokens=640)
        addresses = loaded.runner.contexts["absorbed", "decode"].addresses
        assert all(addresses[c] == addresses[f"{c}.updated"] for c in fakes.CACHES)


def test_without_capture(bundle, device, monkeypatch):
    install(monkeypatch, fakes.package(fakes.FakeEngine(device)))
    backends.load(bundle, "sm89", cache_tokens=640, capture=False).step(decode_batch(2))
    assert len(executed(device)) == 1 and ("begin capture",) not in device.log


def test_every_captured_shape_has_a_context_of_its_own(backend, device):
    for count in (1, 3, 1, 3):
        backend.step(decode_batch(count))
    assert backend.load_seconds["graphs"] == "2 shapes captured"
    contexts = [run[5] for run in executed(device)]
    assert contexts[:3] == [contexts[0]] * 3 and contexts[3:] == [contexts[3]] * 3 and contexts[0] is not contexts[3]
    assert not {id(c) for c in contexts} & {id(c) for c in backend.runner.contexts.values()}


def test_engine_that_cannot_be_captured(backend, device, monkeypatch, capsys):
    monkeypatch.setattr(fakes.RtxContext, "capturable", False)
    for count in (2, 2, 3):
        assert backend.step(decode_batch(count)).logits().shape == (count, fakes.VOCAB)
    assert ("begin capture",) not in device.log and len(executed(device)) == 2 + 3, "two to warm up, then every step"
    assert capsys.readouterr().err.count("without CUDA graphs, which costs time: the engine says") == 1
    assert backend.load_seconds["graphs"] == "eager: the engine says that it cannot be captured"


@pytest.mark.parametrize("error", [cuda_device.CudaError("cuStreamEndCapture: invalidated"), EngineError("the engine refuses")])
def test_a_failed_capture_is_survived(backend, device, monkeypatch, capsys, error):
    backend.step(decode_batch(1))

    def capture(stream, enqueue):
        raise error

    monkeypatch.setattr(device, "capture", capture)
    device.log.clear()
    for count in (3, 3, 1):
        assert backend.step(decode_batch(count)).logits().shape == (count, fakes.VOCAB)
    assert len(executed(device)) == 2 + 2, "two to warm up, then every step of that shape"
    contexts = {run[5] for run in executed(device)[2:]}
    assert contexts == {backend.runner.contexts["absorbed", "decode"]}, "not in the context that failed"
    assert [e[0] for e in device.log].count("launch") == 1, "what was captured before is replayed"
    assert capsys.readouterr().err.count(str(error)) == 1 and backend.load_seconds["graphs"] == f"eager: {error}"


# contexts and their memory


def test_contexts_share_one_block_of_memory(backend, device):
    backend.step(decode_batch(1))
    engine = backend.engines["absorbed"]
    assert len(engine.contexts) == 3 and {c.strategies[0] for c in engine.contexts} == {fakes.USER_MANAGED}
    ((address, size),) = {c.memory for c in engine.contexts}
    assert device.blocks[address] == size == engine.device_memory_size_v2 == backend.load_seconds["context_bytes"]


def test_only_decode_steps_wait_for_kernels_of_their_shape(backend):
    """LAZY: general kernels run until those of a shape are compiled. A captured step has to stay valid: EAGER."""
    backend.step(decode_batch(1))
    engine = backend.engines["absorbed"]
    assert [(c.profile, c.strategies[1]) for c in engine.contexts] == [(0, "eager"), (1, "lazy"), (0, "eager")]


def test_no_context(bundle, device, monkeypatch):
    engine = fakes.FakeEngine(device)
    engine.create_execution_context = lambda given: None
    install(monkeypatch, fakes.package(engine))
    with pytest.raises(EngineError, match="gives no execution context"):
        backends.load(bundle, "sm89", cache_tokens=640)


def test_full_tensorrt(tmp_path, device, monkeypatch):
    """It has runtime configurations, but no kernels to compile and no answer to whether a step can be captured."""
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    bundle, engine = fakes.Builder(tmp_path / "full").write(backend="tensorrt"), fakes.FullEngine(device)
    install(monkeypatch, fakes.package(engine, full=True))
    backend = backends.load(bundle, "sm89", cache_tokens=640)
    for count in (2, 2):
        backend.step(decode_batch(count))
    backend.step(pack([SequenceRows([1, 2], 0, [1])], TABLE[:1]))
    assert [run[1] for run in executed(device)] == [0, 0, 0, 1]
    assert backend.load_seconds["runtime_cache"] == "none" and backend.load_seconds["graphs"] == "1 shapes captured"
    ((address, size),) = {c.memory for c in engine.contexts}
    assert {c.strategies for c in engine.contexts} == {(fakes.USER_MANAGED,)} and device.blocks[address] == size == 5000
    backend.close()
    assert not (tmp_path / "cache").exists()


def test_close_lets_go_of_contexts_before_memory(backend, device):
    backend.step(decode_batch(1))
    seen = [weakref.ref(c) for c in backend.engines["absorbed"].contexts]
    backend.engines["absorbed"].contexts.clear()
    device.log.clear()
    device.close = lambda: device.log.append([c() for c in seen])
    backend.close()
    assert device.log == [[None] * 3]
    backend.close()  # a second time does nothing




# TensorRT-RTX's runtime cache


def test_runtime_cache_is_kept(bundle, device, monkeypatch):
    states = []
    for _ in range(2):
        engine = fakes.FakeEngine(device)
        install(monkeypatch, fakes.package(engine))
        backend = backends.load(bundle, "sm89", cache_tokens=640)
        backend.step(decode_batch(1))
        states.append((backend.load_seconds["runtime_cache"], engine.cache.given))
    assert states == [("cold", None), ("warm", b"compiled")]
    (cache,) = backend.runtime_caches.values()
    assert cache.path.read_bytes() == b"compiled"
    assert "Fake_GPU-13000-1.7.1.116-" in cache.path.name
    assert {"plan", "weights", "contexts", "first_step"} <= set(backend.load_seconds)


def test_kernels_of_later_shapes_are_kept_too(backend):
    """Nothing closes a backend when a process ends."""
    (cache,) = backend.runtime_caches.values()
    backend.step(decode_batch(1))
    backend.engines["absorbed"].cache.content = b"compiled more"
    backend.step(decode_batch(1))
    assert cache.path.read_bytes() == b"compiled"
    backend.step(decode_batch(3))
    assert cache.path.read_bytes() == b"compiled more"


def test_runtime_cache_that_cannot_be_written(bundle, device, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "file"))
    install(monkeypatch, fakes.package(fakes.FakeEngine(device)))
    backends.load(bundle, "sm89", cache_tokens=640).step(decode_batch(1))
    assert "the next load compiles again" in capsys.readouterr().err


def test_cache_size_keeps_within_the_profiles(bundle, device, monkeypatch):
    install(monkeypatch, fakes.package(fakes.FakeEngine(device)))
    assert backends.load(bundle, "sm89", cache_tokens=1 << 30).num_pages == 100
    assert backends.load(bundle, "sm89", cache_tokens=1).num_pages == 2


def test_cache_takes_most_of_the_memory_that_is_free(bundle, device, monkeypatch):
    """Weights, activations and outputs are counted already; what captured graphs take is left free."""
    install(monkeypatch, fakes.package(fakes.FakeEngine(device)))
    monkeypatch.setattr(fakes.FullEngine, "device_memory_size_v2", 300_000)
    device.free = 1_000_000
    backend = backends.load(bundle, "sm89")
    caches = sum(device.blocks[c] for c in backend.caches)
    left = device.free - (sum(device.blocks.values()) - caches)
    page = fakes.LAYERS * fakes.PAGE * fakes.WIDTH * 2
    assert left < 700_000 and 0.9 * left < caches <= 0.9 * left + 2 * page
    device.free = 1 << 40
    assert backends.load(bundle, "sm89").num_pages == 100, "the profile's limit"


def test_cache_holds_no_more_than_all_sequences_can_fill(backend):
    target = backend.target.model_copy(update={"profiles": {}})
    pages = target.limits.max_sequences * target.limits.max_context // fakes.PAGE
    assert base.gpu_pages_for(target, None, 1 << 50) == pages + 1
    assert base.gpu_pages_for(target, None, 0) == 2, "one page and the scratch page"
    assert base.gpu_pages_for(target, 640, 0) == 11, "what is asked for is not cut down"


def test_gpu_check_tells_whether_caches_are_copied_and_steps_captured(bundle, device, monkeypatch):
    install(monkeypatch, fakes.package(fakes.FakeEngine(device)))
    monkeypatch.setattr(engine_cache, "PAGES", (16, 100))
    checks, measured = [], {}
    run = SimpleNamespace(measure=lambda name, **values: measured.update(values), check=lambda *given: checks.append(given))
    engine_cache.check(run, "engine", bundle, "sm89")
    assert checks[0][1] > 0 and checks[1][1:] == (0, 0, "1 shapes captured") and measured["aliased"] == "latent_cache.0"
    monkeypatch.setattr(fakes.RtxContext, "capturable", False)
    engine_cache.check(run, "engine", bundle, "sm89")
    assert checks[-1][1:3] == (1, 0)


def test_chunks_are_as_long_as_a_step(backend):
    assert backend.prefill_chunk == backend.target.limits.max_batch_tokens == 128
