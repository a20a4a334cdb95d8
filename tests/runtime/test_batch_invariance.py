"""Batch invariance on the CPU: random mixtures of requests give each of them the bits that it gets alone."""

import json
import shutil
from collections import deque
from functools import cache

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import latentrt
from latentrt import cli
from latentrt.runtime import backends
from latentrt.runtime.api import Engine
from latentrt.runtime.backends.invariance import whole_steps
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.errors import RequestError
from latentrt.runtime.sampling_params import SamplingParams
from tests import ragged
from tests.conftest import VOCAB_SIZE
from tests.ragged import Pages

KERNELS = ["native", "onnxruntime"] if shutil.which("g++") else ["onnxruntime"]
BUILDS = {  # precision, accuracy, cache format; own kernels read those at "fast"
    "fp32": ("fp32", "exact", "auto"), "fp32-int6r": ("fp32", "exact", "int6r"), "int8": ("int8", "fast", "auto"),
    "int8-exact": ("int8", "exact", "auto"), "int4": ("int4", "fast", "auto"), "int4-exact": ("int4", "exact", "auto"),
    "int8-float16": ("int8", "fast", "float16"), "int8-int6": ("int8", "fast", "int6"), "int4-int4": ("int4", "fast", "int4"),
    "int8-fp8": ("int8", "fast", "fp8"),
}  # fmt: skip
CASES = [(name, k) for name, (_, accuracy, _) in BUILDS.items() for k in KERNELS if accuracy == "fast" or k == "onnxruntime"]
MIXED = settings(
    max_examples=5, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
needs_own_kernels = pytest.mark.skipif("native" not in KERNELS, reason="needs g++")
LENGTHS = [150, 70, 1, 9]


@pytest.fixture(scope="module")
def bundles(traced, tiny_checkpoint, tmp_path_factory):
    built = {}

    def bundle(name: str) -> Bundle:
        if name not in built:
            precision, accuracy, cache = BUILDS[name]
            options = {"precision": precision, "accuracy": accuracy, "cache_format": cache}
            out = tmp_path_factory.mktemp(name) / "bundle"
            built[name] = Bundle(traced.build_once(f"tiny.invariant.{name}", tiny_checkpoint, out, "cpu", **options))
        return built[name]

    return bundle


@pytest.fixture(scope="module")
def loaded(bundles):
    """Backends by bundle and kernels, each loaded once."""
    kept = {}

    def load(name: str, kernels: str, **options):
        key = name, kernels, *options.items()
        if key not in kept:
            kept[key] = backends.load(bundles(name), kernels=kernels, cache_tokens=640, batch_invariant=True, **options)
        return kept[key]

    yield load
    for backend in kept.values():
        backend.close()


def token_lists() -> list[list[int]]:
    return [np.random.default_rng(n).integers(0, VOCAB_SIZE, n).tolist() for n in LENGTHS]


def logits(backend, tokens, schedule, seed=0) -> list[np.ndarray]:
    step, pages = ragged.engine_step(backend), Pages([*map(len, tokens)], backend.target.cache.page_size, seed)
    return ragged.run(step, tokens, schedule, pages)


@pytest.fixture(scope="module")
def alone(loaded):
    """Logits of every sequence by itself, in one chunk."""
    return cache(lambda *key: [logits(loaded(*key), [sequence], [])[0] for sequence in token_lists()])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kernels"), CASES)
@MIXED
@given(st.data())
def test_logits_are_those_of_the_sequence_alone(loaded, alone, name, kernels, data):
    """Every position's logits, in ragged steps beside others over other pages, as in one chunk without anybody."""
    backend, tokens = loaded(name, kernels), token_lists()
    counts = st.sampled_from([0, 1, 1, 2, 7, 16, 33, 64, 129])
    schedule = data.draw(st.lists(st.lists(counts, min_size=4, max_size=4), max_size=6))
    together = logits(backend, tokens, schedule, seed=data.draw(st.integers(0, 9)))
    for expected, found in zip(alone(name, kernels), together, strict=True):
        np.testing.assert_array_equal(found, expected)


@needs_own_kernels
def test_threads_change_nothing(loaded):
    schedule = [[100, 1, 1, 3], [1, 40, 0, 1]]
    several = [logits(loaded("int8", "native", threads=n), token_lists(), schedule) for n in (1, 3)]
    for one, three in zip(*several, strict=True):
        np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize(("name", "kernels"), [("int8", k) for k in KERNELS])
def test_without_the_option_logits_depend_on_the_step(bundles, name, kernels):
    """Or else nothing here would test anything."""
    with backends.load(bundles(name), kernels=kernels, cache_tokens=640) as backend:
        tokens = token_lists()
        assert not np.array_equal(logits(backend, tokens[:1], [[1]] * 60)[0], logits(backend, tokens[:1], [])[0])


def request(data) -> tuple[list[int], SamplingParams]:
    """Some begin alike, so that pages are shared; all have a seed."""
    shared, own = data.draw(st.sampled_from([0, 64, 70])), data.draw(st.integers(1, 40))
    tokens = token_lists()[0][:shared] + np.random.default_rng(own).integers(0, VOCAB_SIZE, own).tolist()
    ways = [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.2, "top_k": 20, "min_p": 0.01},
            {"repetition_penalty": 1.2}]  # fmt: skip
    given = data.draw(st.sampled_from(ways)) | {"max_new_tokens": data.draw(st.integers(1, 12)), "logprobs": 3}
    return tokens, SamplingParams(seed=data.draw(st.integers(0, 99)), ignore_eos=True, **given)


def answers(engine: Engine, asked, arrivals: list[int]) -> list[list[tuple]]:
    """Each request's events (token, log probabilities); request i comes when so many steps have been run since the last."""
    sink, found = deque(), [[] for _ in asked]
    waiting = [engine.sequence(tokens, params, sink, index) for index, (tokens, params) in enumerate(asked)]
    for sequence, steps in zip(waiting, arrivals, strict=True):
        for _ in range(steps):
            engine.loop.step()
        engine.loop.add([sequence])
    while engine.loop.step():
        pass
    for event in sink:
        assert event.error is None
        found[event.index].append((event.token, event.logprobs))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kernels"), [c for c in CASES if c[0] in ("fp32", "int8", "int4-int4")])
@MIXED
@given(st.data())
def test_answers_are_those_of_the_request_alone(bundles, loaded, name, kernels, data):
    """Greedy and seeded: mixtures of requests, arrivals and chunks, shared prefixes, guesses ahead, and a cache so small that
    sequences give their pages back and are read again."""
    bundle, backend = bundles(name), loaded(name, kernels)
    asked = [request(data) for _ in range(data.draw(st.integers(2, 6)))]
    arrivals = data.draw(st.lists(st.integers(0, 4), min_size=len(asked), max_size=len(asked)))
    chunk, drafts = data.draw(st.sampled_from([None, 1, 5, 64])), data.draw(st.sampled_from([0, 3]))
    together = answers(Engine(bundle, backend, chunk, drafts), asked, arrivals)
    for one, found in zip(asked, together, strict=True):
        assert found == answers(Engine(bundle, backend), [one], [0])[0]
        assert len(found) == one[1].max_new_tokens


@needs_own_kernels
def test_own_kernels_take_whole_steps(loaded, monkeypatch):
    """Else the option would cost all that batching gains."""
    backend, runs = loaded("int8", "native"), []
    monkeypatch.setattr(backend, "_run", lambda batch: runs.append(batch) or np.zeros((len(batch.logit_rows), 1)))
    logits(backend, token_lists(), [])
    assert len(runs) == 1


@needs_own_kernels
@pytest.mark.parametrize("change", ["unknown op", "weights of several matrices"])
def test_graphs_that_hold_something_else_run_row_by_row(bundles, monkeypatch, tmp_path, change):
    bundle = bundles("int8")
    file = bundle.file(bundle.target(None)[1].engines["absorbed"].native)
    model = onnx.load(str(file), load_external_data=False)
    if change == "unknown op":
        model.graph.node[0].op_type = "Softmax"
    else:
        gemm = next(n for n in model.graph.node if n.op_type == "Gemm")
        next(t for t in model.graph.initializer if t.name == gemm.input[1]).dims.append(1)
    onnx.save(model, tmp_path / "other.onnx")
    assert whole_steps(tmp_path / "other.onnx") is None

    monkeypatch.setattr("latentrt.runtime.backends.invariance.whole_steps", lambda file: None)
    with backends.load(bundle, kernels="native", cache_tokens=640, batch_invariant=True) as backend:
        together = logits(backend, token_lists(), [[33, 1, 0, 7], [1, 1, 1, 1]])
        for sequence, found in zip(token_lists(), together, strict=True):
            np.testing.assert_array_equal(found, logits(backend, [sequence], [])[0])


def test_teacher_forced_logits_do_not_depend_on_other_lists(bundles):
    with latentrt.load(bundles("int8").path, cache_tokens=640, batch_invariant=True) as engine:
        alone = [engine.logits([tokens]) for tokens in token_lists()]
        np.testing.assert_array_equal(engine.logits(token_lists()), np.concatenate(alone))


def test_other_backends_are_refused_by_name(bundles):
    with pytest.raises(RequestError, match=r"batch_invariant is set, but target cpu runs on torch, for which it is not proven; "
                                           r"accepted: onnxruntime \(target cpu\)"):  # fmt: skip
        latentrt.load(bundles("int8").path, backend="torch", batch_invariant=True)


def test_commands_have_the_option(bundles, capsys):
    path, answer = str(bundles("int8").path), []
    for more in ([], ["--prompt", "import os"], ["--prompt", "def f(x):", "--prompt", "a" * 90]):
        given = ["generate", path, "--prompt", "print(", *more, "--max-new-tokens", "8", "--temperature", "1", "--seed", "3"]
        assert cli.main([*given, "--batch-invariant", "--json"]) == 0
        answer.append(json.loads(capsys.readouterr().out)["results"][0])
    assert answer[0]["token_ids"] == answer[1]["token_ids"] == answer[2]["token_ids"]
    assert cli.main([*given, "--backend", "torch", "--batch-invariant"]) == 2
    assert "batch_invariant is set, but target cpu runs on torch" in capsys.readouterr().err


def test_the_server_has_the_option(bundles, monkeypatch):
    from latentrt.runtime import api
    from latentrt.runtime.server import process

    given = {}
    monkeypatch.setattr(api, "load", lambda path, **options: given.update(options))
    monkeypatch.setattr(process, "listen", lambda host, port: [])
    monkeypatch.setattr(process, "run", lambda engine, settings, sockets: 0)
    for options, expected in (([], False), (["--batch-invariant"], True)):
        assert cli.main(["serve", str(bundles("int8").path), *options]) == 0
        assert given["batch_invariant"] is expected
