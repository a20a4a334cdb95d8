"""Own CPU kernels against ONNX Runtime's, against formulas in float64, and against themselves on other processors."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.plugins.cpu import compile
from latentrt.plugins.mla_attention.reference import mla_attention
from tests.plugins import cpu_nodes
from tests.plugins.cpu_nodes import attention, experts, linear, rounded, run

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
SETTINGS = settings(max_examples=30, deadline=None, derandomize=True)
BLOCKS = st.sampled_from([16, 32, 64, 128])


def close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Within `tolerance` of the largest value: what float32 sums of some thousand terms differ by is about 1e-6 of it."""
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1e-30, np.abs(expected).max(initial=0)))


@SETTINGS
@given(st.integers(0, 20), st.integers(1, 400), st.integers(1, 100), BLOCKS, st.sampled_from([4, 8]), st.booleans())
def test_linear(rows, inputs, outputs, block, bits, bias):
    found, feeds, real, addend = linear(np.random.default_rng(inputs), rows, inputs, outputs, block, bits, bias)
    (y,) = run(found, feeds)
    close(y, rounded(feeds["x"], block) @ real.T + addend, 2e-6)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize(("inputs", "outputs"), [(1024, 576), (2816, 64)])
def test_linear_is_onnxruntimes(rows, inputs, outputs):
    found, feeds, _, _ = linear(np.random.default_rng(0), rows, inputs, outputs, 128)
    close(run(found, feeds)[0], run(found, feeds, own=False)[0], 2e-6)


def test_rows_do_not_depend_on_each_other():
    """A row of a batch has the bits that it has alone: decode steps and prompts agree."""
    found, feeds, _, _ = linear(np.random.default_rng(0), 13, 256, 50, 64)
    (y,) = run(found, feeds)
    for r in range(13):
        np.testing.assert_array_equal(run(found, {"x": feeds["x"][r : r + 1]})[0], y[r : r + 1])


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 1e-40, 3e38])
def test_linear_of_extreme_activations(value):
    """NaN and infinity end as NaN in their own row only; zeros, denormal and huge numbers end as finite numbers."""
    found, feeds, _, _ = linear(np.random.default_rng(0), 3, 256, 40, 128)
    feeds["x"][1, 7:9] = value
    (y,) = run(found, {"x": feeds["x"]})
    assert np.isfinite(y[[0, 2]]).all()
    assert np.isnan(y[1]).all() if not np.isfinite(value) else np.isfinite(y[1] / 1e3).all()


@SETTINGS
@given(st.integers(0, 12), st.integers(1, 6), st.integers(1, 3), st.integers(1, 5), BLOCKS, st.integers(0, 1),
       st.sampled_from([4, 8]), st.data())  # fmt: skip
def test_experts(tokens, count, hidden_blocks, inner_blocks, block, first, bits, data):
    top_k = data.draw(st.integers(1, count))
    rng = np.random.default_rng(tokens)
    sizes = hidden_blocks * block, inner_blocks * block, block
    found, feeds, (gate_up, down) = experts(rng, tokens, count, top_k, *sizes, first, bits)
    (y,) = run(found, feeds)
    expected = np.zeros(feeds["x"].shape)
    x = rounded(feeds["x"], block)
    for t, j in np.ndindex(feeds["ids"].shape):
        if 0 <= (e := feeds["ids"][t, j] - first) < count:
            both = gate_up[e] @ x[t]
            inner = (both[0::2] / (1 + np.exp(-both[0::2])) * both[1::2]).astype(np.float32)
            expected[t] += feeds["weights"][t, j] * (down[e] @ rounded(inner, block))
    # the last bit of an inner activation decides about the rounding to int8 of single values: 1/127 of one of hundreds
    close(y, expected, 1e-2)
    assert not y.size or np.median(np.abs(y - expected)) <= 1e-5 * np.abs(expected).max() + 1e-30


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tokens", [1, 30])
def test_experts_are_onnxruntimes(tokens, bits):
    found, feeds, _ = experts(np.random.default_rng(1), tokens, 8, 3, 256, 128, 128, 0, bits)
    close(run(found, feeds)[0], run(found, feeds, own=False)[0], 2e-2)


SEQUENCES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5)), min_size=1, max_size=4).filter(
    lambda found: any(new for _, new in found)
)


def check_attention(found, feeds, attributes) -> None:
    tensors = [torch.from_numpy(x.copy()) for x in feeds.values()]
    expected, cache = mla_attention(*[t.double() if t.dtype == torch.float32 else t for t in tensors[:4]], *tensors[4:],
                                    **attributes)  # fmt: skip
    attended, updated = run(found, feeds)
    close(attended, expected.numpy(), 3e-6)
    np.testing.assert_array_equal(updated, cache.numpy())


@SETTINGS
@given(SEQUENCES, st.sampled_from([1, 3, 64]), st.sampled_from([1, 5, 16, 17]), st.integers(0, 3), st.booleans(),
       st.sampled_from([(8, 4), (64, 32), (70, 6)]))  # fmt: skip
def test_attention(sequences, page_size, heads, padding, half, widths):
    check_attention(*attention(np.random.default_rng(3), sequences, page_size, heads, *widths, padding, half))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("sequences", [[(1000, 1), (3, 2)], [(255, 1)], [(256, 1)], [(300, 40)]])
def test_attention_over_several_splits(sequences, half):
    check_attention(*attention(np.random.default_rng(4), sequences, 64, 16, 64, 32, half=half))


def test_attention_refuses_pages_that_do_not_exist():
    found, feeds, _ = attention(np.random.default_rng(3), [(5, 1)], 4, 2, 8, 4)
    feeds["block_table"][0, 1] = 1000
    with pytest.raises(Exception, match="a page does not exist"):
        run(found, feeds)


def digests(isa: str, threads: int) -> list[str]:
    environment = os.environ | {"LATENTRT_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-m", "tests.plugins.cpu_nodes", str(threads)], env=environment, text=True,
                          capture_output=True, check=True)  # fmt: skip
    return done.stdout.split()


def test_results_do_not_depend_on_processor_and_threads():
    """Products have the same bits in every instruction set. Attention sums in another order, but not for other threads."""
    first = digests("avx512", 1)
    assert digests("avx512", 2) == digests("avx512", 3) == first
    assert all(digests(isa, 2)[:-2] == first[:-2] for isa in cpu_nodes.ISAS)


def test_without_a_compiler_there_is_no_library(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(compile.CannotCompileError, match=r"g\+\+ is not installed"):
        compile.library()


def test_a_compiler_that_fails_says_why(monkeypatch, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo broken 1 && exit 0\necho "no space on device" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(compile.CannotCompileError, match="no space on device"):
        compile.library()
    assert not list((tmp_path / "cache" / "native").rglob("lib.so"))


@pytest.mark.slow
def test_kernels_stay_within_their_memory(tmp_path):
    """Built with the address and undefined-behaviour sanitizers, on data that ends where its memory ends."""
    program, sources = tmp_path / "sanitized", compile.SOURCES
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{sources}"]
    flags += [f for f in compile.FLAGS if not f.startswith("-O")]
    files = [str(Path(__file__).with_name("cpu_sanitized.cpp")), str(sources / "kernels.cpp")]
    subprocess.run(["g++", *flags, *files, "-o", str(program)], check=True)
    for isa in cpu_nodes.ISAS:
        done = subprocess.run([program], env=os.environ | {"LATENTRT_CPU_ISA": isa}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
