"""The TensorRT backend with an expanded engine beside the absorbed one, by the same stand-ins."""

import pytest

from latentrt.plugins.step_graph import StepBatch
from latentrt.runtime import backends
from latentrt.runtime.backends.base import SequenceRows, pack
from latentrt.runtime.errors import BundleError
from tests.runtime import tensorrt_fakes as fakes
from tests.runtime.tensorrt_fakes import TABLE, decode_batch, install


@pytest.fixture
def two_plans(tmp_path, device, monkeypatch):
    """A bundle with an expanded plan, and the module that loads both."""
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    bundle = fakes.Builder(tmp_path / "two").write(expanded=True)
    engine, expanded = fakes.FakeEngine(device), fakes.FakeEngine(device, profiles=1)
    install(monkeypatch, fakes.package(engine, expanded=expanded))
    return bundle


def chunk(rows: int, past: int) -> StepBatch:
    return pack([SequenceRows(range(rows), past, [rows - 1])], TABLE[:1])


def forms_run(backend, *batches) -> list[set[str]]:
    """What ran each batch; nothing where a captured graph was replayed."""
    found = []
    for batch in batches:
        backend.device.log.clear()
        backend.step(batch)
        runs = [(entry[1], entry[5].of) for entry in backend.device.log if entry[0] == "execute"]
        expanded = backend.engines["expanded"]
        found.append({"expanded" if engine is expanded else ("decode", "prefill")[profile] for profile, engine in runs})
    return found


def test_chunks_run_expanded_where_that_takes_fewer_operations(two_plans, device):
    backend = backends.load(two_plans, "sm89", cache_tokens=640)
    found = forms_run(backend, chunk(100, 0), chunk(2, 200), chunk(100, 100), decode_batch(3), decode_batch(3))
    assert found == [{"expanded"}, {"prefill"}, {"expanded"}, {"decode"}, set()], "the last one is the captured graph's replay"


@pytest.mark.parametrize(("prefill", "expected"), [("absorbed", "prefill"), ("expanded", "expanded")])
def test_a_form_can_be_forced_but_for_decode_steps(two_plans, device, prefill, expected):
    backend = backends.load(two_plans, "sm89", cache_tokens=640, prefill=prefill)
    assert forms_run(backend, chunk(100, 0), chunk(2, 200), decode_batch(2)) == [{expected}, {expected}, {"decode"}]


def test_both_engines_share_all_memory(two_plans, device):
    backend = backends.load(two_plans, "sm89", cache_tokens=640)
    absorbed, expanded = (backend.runner.contexts[form, "prefill"] for form in ("absorbed", "expanded"))
    assert (absorbed.profile, expanded.profile) == (1, 0) and absorbed.of is not expanded.of
    fixed = {*fakes.CACHES, *(f"{c}.updated" for c in fakes.CACHES), *fakes.WEIGHTS, "logits", "last_hidden"}
    assert {n: absorbed.addresses[n] for n in fixed} == {n: expanded.addresses[n] for n in fixed}
    assert len(device.uploaded) == 1
    assert absorbed.memory == expanded.memory and expanded.strategies == (fakes.USER_MANAGED, "lazy")


def test_memory_of_activations_is_as_large_as_the_larger_engine_needs(two_plans, device, monkeypatch):
    engine, expanded = fakes.FakeEngine(device), fakes.FakeEngine(device, profiles=1)
    expanded.device_memory_size_v2 = 70_000
    install(monkeypatch, fakes.package(engine, expanded=expanded))
    backend = backends.load(two_plans, "sm89", cache_tokens=640)
    assert {c.memory[1] for c in backend.runner.contexts.values()} == {70_000}


def test_the_expanded_plan_is_refused_like_the_other(two_plans, device, monkeypatch):
    engine = fakes.FakeEngine(device)
    extra = r"the expanded plan is not the manifest's: only in the plan \['c.weight'\]"
    for expanded, message in (
        (None, "refuses this plan"),
        (fakes.FakeEngine(device), "the plan has 2 profiles, the manifest names 1"),
        (fakes.FakeEngine(device, ["c.weight"], 1), extra),
    ):
        install(monkeypatch, fakes.package(engine, expanded=expanded))
        with pytest.raises(BundleError, match=message):
            backends.load(two_plans, "sm89")
    two_plans.file(two_plans.manifest.targets["sm89"].engines["expanded"].graph).unlink()
    with pytest.raises(BundleError, match="missing; the bundle is damaged"):
        backends.load(two_plans, "sm89")


def test_what_compiled_is_kept_for_each_plan(two_plans, device, monkeypatch):
    engines = [fakes.FakeEngine(device, profiles=n) for n in (2, 1)]
    install(monkeypatch, fakes.package(engines[0], expanded=engines[1]))
    backend = backends.load(two_plans, "sm89", cache_tokens=640)
    backend.step(chunk(100, 0))
    paths = {cache.path for cache in backend.runtime_caches.values()}
    assert len(paths) == 2 and all(path.read_bytes() == b"compiled" for path in paths)


def test_an_expanded_form_that_was_not_built(tmp_path, device):
    bundle = fakes.Builder(tmp_path / "bundle").write()
    with pytest.raises(BundleError, match="target sm89: prefill is 'expanded', but it has no expanded engine"):
        backends.load(bundle, "sm89", prefill="expanded")
