"""A bundle with own kernels and without: the same logits, and a fallback that says so in one line."""

import shutil

import numpy as np
import pytest

from latentrt.runtime import backends
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.errors import RequestError
from tests import ragged
from tests.conftest import VOCAB_SIZE
from tests.ragged import Pages

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
LENGTHS = [70, 9, 1, 130]
SCHEDULE = [[64, 3, 0, 100], [1, 1, 1, 1], [2, 0, 0, 20]]


@pytest.fixture(scope="module")
def int8_bundle(traced, tiny_checkpoint, tmp_path_factory) -> Bundle:
    return Bundle(traced.build_once("tiny.int8", tiny_checkpoint, tmp_path_factory.mktemp("int8") / "bundle", "cpu", "int8"))


def logits(bundle: Bundle, **options) -> list[np.ndarray]:
    """Of every token of a few sequences that run in ragged chunks."""
    tokens = [list(np.random.default_rng(n).integers(0, VOCAB_SIZE, n)) for n in LENGTHS]
    with backends.load(bundle, cache_tokens=1000, **options) as backend:
        return ragged.run(ragged.engine_step(backend), tokens, SCHEDULE, Pages(LENGTHS, 64))


@needs_compiler
def test_own_kernels_are_as_near_to_float32_as_onnxruntimes(int8_bundle, tiny_bundle):
    """Sums in another order decide about the rounding of single activations to int8, so that the two differ from each other as
    much as from float32: about a fiftieth of the logits' spread. A quarter more is allowed for the other order."""
    exact = logits(Bundle(tiny_bundle))
    own, theirs = (distance(logits(int8_bundle, kernels=kernels), exact) for kernels in ("native", "onnxruntime"))
    assert own < 1.25 * theirs < 0.05


def distance(found: list[np.ndarray], exact: list[np.ndarray]) -> float:
    """Mean difference, as a part of the logits' spread."""
    differences = [np.abs(a - b).mean() for a, b in zip(found, exact, strict=True)]
    return float(np.average(differences, weights=[len(x) for x in exact]) / np.concatenate(exact).std())


@needs_compiler
def test_threads_change_nothing(int8_bundle):
    for one, three in zip(logits(int8_bundle, threads=1), logits(int8_bundle, threads=3), strict=True):
        np.testing.assert_array_equal(one, three)


def test_without_a_compiler_onnxruntimes_kernels_run(int8_bundle, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("PATH", str(tmp_path))
    with backends.load(int8_bundle, cache_tokens=64) as backend:
        assert not backend.native
    (line,) = capfd.readouterr().err.splitlines()
    assert line == "latentrt: no own CPU kernels, ONNX Runtime's are slower: g++ is not installed"
    with pytest.raises(RequestError, match=r"kernels is 'native', but g\+\+ is not installed"):
        backends.load(int8_bundle, cache_tokens=64, kernels="native")


def test_a_library_that_does_not_load_is_no_obstacle(int8_bundle, monkeypatch, tmp_path, capfd):
    broken = tmp_path / "lib.so"
    broken.write_bytes(b"nothing")
    monkeypatch.setattr("latentrt.plugins.cpu.compile.library", lambda: broken)
    with backends.load(int8_bundle, cache_tokens=64) as backend:
        assert not backend.native
    assert "no own CPU kernels" in capfd.readouterr().err


def test_kernels_by_environment(int8_bundle, monkeypatch):
    monkeypatch.setenv("LATENTRT_CPU_KERNELS", "onnxruntime")
    with backends.load(int8_bundle, cache_tokens=64) as backend:
        assert not backend.native


def test_a_float32_bundle_has_no_own_kernels(tiny_bundle):
    with pytest.raises(RequestError, match="only int8 and int4 at accuracy fast have one"):
        backends.load(Bundle(tiny_bundle), cache_tokens=64, kernels="native")
