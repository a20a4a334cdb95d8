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
from tests.plugins import cpu_nodes
from tests.plugins.cpu_nodes import experts, linear, rounded, run
from tests.plugins.test_cache_formats import PACKED

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


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Pairs of neighbours as complex numbers, turned."""
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * (cos + 1j * sin)
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def check_mla(case: cpu_nodes.MlaCase, expanded: bool) -> None:
    """The formula in float64, with activations rounded to int8 where the form of attention has a product."""
    attended, updated = run(case.model, case.feeds)
    feeds = {k: x.astype(np.float64) if x.dtype.kind == "f" else x for k, x in case.feeds.items()}
    (heads, rank, nope), v, page_size = case.w_uk.shape, case.w_uv.shape[1], feeds["cache"].shape[1]
    x = feeds["kv"][:, :rank]
    latent = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * feeds["norm"]
    added = np.concatenate([latent, rotated(feeds["kv"][:, rank:], feeds["cos"], feeds["sin"])], -1)
    q, rope = feeds["q"].reshape(len(x), heads, -1), added.shape[1] - rank
    appended = case.layout.encode(*torch.from_numpy(added.astype(np.float32)).split([rank, rope], -1)).numpy()
    expected_cache = case.feeds["cache"].copy()
    q_nope, q_pe = q[..., :nope], rotated(q[..., nope:], feeds["cos"][:, None], feeds["sin"][:, None])
    expected = np.zeros((len(x), heads, v))
    for b, past in enumerate(feeds["cached_lengths"]):
        first, last = feeds["query_starts"][b : b + 2]
        if first == last:
            continue
        cells = [(feeds["block_table"][b, t // page_size], t % page_size) for t in range(past + last - first)]
        for t, row in zip(range(past, len(cells)), range(first, last), strict=True):
            expected_cache[cells[t]] = appended[row]
        c, k_pe = tokens_in(updated, cells, case.layout, rank, rope)
        check_appended(c, k_pe, *tokens_in(expected_cache, cells, case.layout, rank, rope))
        for row, h in np.ndindex(last - first, heads):
            n, head = past + row + 1, (first + row, h)
            if expanded:
                keys = rounded(c[:n] * case.w_uk_scale[h], largest_block(rank)) @ (case.w_uk[h] / case.w_uk_scale[h][:, None])
                scores, values = keys @ q_nope[head], rounded(c[:n], case.block) @ case.w_uv[h].T
            else:
                scores, values = c[:n] @ (case.w_uk[h] @ rounded(q_nope[head][None], case.block)[0]), c[:n]
            scores = 0.2 * (scores + k_pe[:n] @ q_pe[head])
            weights = np.exp(scores - scores.max())
            found = weights @ values / weights.sum()
            expected[head] = found if expanded else case.w_uv[h] @ rounded(found[None], case.block)[0]
    before, now, wanted = (x.view(np.uint8) for x in (case.feeds["cache"], updated, expected_cache))
    assert ((before == now).all(-1) | (before != wanted).any(-1)).all()  # no other slots are written
    close(attended, expected.reshape(len(x), -1), 1e-2)  # the last bit of an activation decides about its rounding to int8
    assert np.median(np.abs(attended - expected.reshape(attended.shape))) <= 2e-5 * np.abs(expected).max()


def tokens_in(cache: np.ndarray, cells: list[tuple], layout, rank: int, rope: int) -> tuple[np.ndarray, np.ndarray]:
    """Latents and k_pe of some cells, float64."""
    rows = torch.from_numpy(np.array([cache[cell] for cell in cells]))
    return tuple(x.double().numpy() for x in layout.decode(rows, rank, rope))


def check_appended(*found: np.ndarray) -> None:
    """The kernels' latents and k_pe are what torch stores of the formula's, but where float32 rounds to another code."""
    for mine, theirs in zip(found[:2], found[2:], strict=True):
        largest = np.abs(theirs).max(-1, keepdims=True)
        assert (np.abs(mine - theirs) <= largest / 6).all()  # a step of the widest, 4 bits
        assert (np.abs(mine - theirs) > largest * 2e-3).mean() < 0.02  # float16 rounds by 5e-4


def largest_block(rank: int) -> int:
    return next(block for block in (128, 64, 32, 16, 8) if rank % block == 0)


@SETTINGS
@given(SEQUENCES, st.sampled_from([1, 3, 64]), st.sampled_from([1, 5, 16, 17]), st.integers(0, 3), st.booleans(),
       st.sampled_from([(8, 4, 2, 6), (64, 32, 16, 24), (72, 20, 6, 40)]), st.booleans())  # fmt: skip
def test_mla(sequences, page_size, heads, padding, half, sizes, expanded):
    rng, form = np.random.default_rng(3), "expanded" if expanded else "absorbed"
    cache_format = "float16" if half else "float32"
    check_mla(cpu_nodes.mla(rng, sequences, page_size, heads, *sizes, padding, cache_format, form, block=32), expanded)


@SETTINGS
@given(SEQUENCES, st.sampled_from([3, 64]), st.integers(0, 2), st.sampled_from(PACKED),
       st.sampled_from([(32, 8, 8, 12), (64, 32, 16, 24), (96, 20, 24, 40), (256, 16, 64, 16)]), st.booleans())  # fmt: skip
def test_mla_over_a_packed_cache(sequences, page_size, padding, cache_format, sizes, expanded):
    rng, form = np.random.default_rng(3), "expanded" if expanded else "absorbed"
    check_mla(cpu_nodes.mla(rng, sequences, page_size, 3, *sizes, padding, cache_format, form, block=32), expanded)


@pytest.mark.parametrize("cache_format", ["float32", "float16", "int6"])
@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("sequences", [[(1000, 1), (3, 2)], [(255, 1)], [(256, 1)], [(300, 40)], [(0, 70)]])
def test_mla_over_several_splits(sequences, cache_format, expanded):
    form = "expanded" if expanded else "absorbed"
    check_mla(cpu_nodes.mla(np.random.default_rng(4), sequences, 64, 4, 64, 32, 16, 24, 0, cache_format, form), expanded)


def test_latents_too_wide_for_sums_of_32_bits_are_unpacked():
    """2,080 elements: sums of products of 16 bits might not fit."""
    check_mla(cpu_nodes.mla(np.random.default_rng(7), [(5, 1), (0, 2)], 4, 2, 2080, 8, 16, 8, 0, "int6", "absorbed", 32), False)


@pytest.mark.parametrize("size", [1e6, 1e-6])
def test_fp8_latents_of_any_size(size):
    """A scale of 128 or more cannot be multiplied by the power of two that e4m3's bits need."""
    case = cpu_nodes.mla(np.random.default_rng(8), [(0, 9), (0, 1)], 4, 2, 64, 32, 16, 24, 0, "fp8", "absorbed", 32)
    case.feeds["norm"], case.feeds["q"] = (case.feeds[n] * np.float32(by) for n, by in (("norm", size), ("q", 1 / size)))
    check_mla(case, False)


@pytest.mark.parametrize(("sequence", "form"), [((0, 100), "expanded"), ((1000, 2), "absorbed"), ((1000, 200), "expanded")])
def test_a_form_is_chosen_for_each_sequence(sequence, form):
    """The bits are those of the form, whatever else is in the step."""
    sizes = 64, 4, 128, 32, 16, 32
    alone = cpu_nodes.mla(np.random.default_rng(5), [sequence], *sizes, form=form)
    both = cpu_nodes.mla(np.random.default_rng(5), [sequence], *sizes)
    np.testing.assert_array_equal(run(both.model, both.feeds)[0], run(alone.model, alone.feeds)[0])
    mixed = cpu_nodes.mla(np.random.default_rng(6), [(0, 100), (1000, 2)], *sizes)
    (y, _), rows = run(mixed.model, mixed.feeds), [100, 2]
    for b, (first, last) in enumerate([(0, 100), (100, 102)]):
        feeds = mixed.feeds | {k: mixed.feeds[k][first:last] for k in ("q", "kv", "cos", "sin")}
        feeds |= {k: mixed.feeds[k][b : b + 1] for k in ("block_table", "cached_lengths")}
        feeds |= {"query_starts": np.array([0, rows[b]], np.int32), "num_tokens": np.array([rows[b]], np.int32)}
        np.testing.assert_array_equal(run(mixed.model, feeds)[0], y[first:last])


def test_mla_refuses_pages_that_do_not_exist():
    case = cpu_nodes.mla(np.random.default_rng(3), [(5, 1)], 4, 2, 8, 4, 4, 4, block=16)
    case.feeds["block_table"][0, 1] = 1000
    with pytest.raises(Exception, match="a page does not exist"):
        run(case.model, case.feeds)


@SETTINGS
@given(st.integers(0, 20), st.integers(1, 300), st.integers(1, 150), st.integers(1, 100), BLOCKS, st.sampled_from([4, 8]),
       st.sampled_from([4, 8]))  # fmt: skip
def test_gated_mlp(rows, inputs, inner, outputs, block, bits, down_bits):
    found, feeds, real = cpu_nodes.gated(np.random.default_rng(inputs), rows, inputs, inner, outputs, block, bits, down_bits)
    (y,) = run(found, feeds)
    x = rounded(feeds["x"], block)
    left = x @ real["gate"].T
    between = (left / (1 + np.exp(-left)) * (x @ real["up"].T)).astype(np.float32)
    expected = rounded(between, block) @ real["y"].T
    close(y, expected, 1e-2)  # the last bit of an inner activation decides about its rounding to int8
    assert not y.size or np.median(np.abs(y - expected)) <= 1e-5 * np.abs(expected).max() + 1e-30


PRODUCTS = st.tuples(st.integers(1, 100), BLOCKS, st.sampled_from([4, 8]))


@SETTINGS
@given(st.integers(0, 40), st.integers(1, 400), PRODUCTS, PRODUCTS)
def test_a_pair_of_products(rows, inputs, first, second):
    found, feeds, real = cpu_nodes.pair(np.random.default_rng(inputs), rows, inputs, first, second)
    for (_, block, _), weights, y in zip((first, second), real.values(), run(found, feeds), strict=True):
        close(y, rounded(feeds["x"], block) @ weights.T, 2e-6)


def digests(isa: str, threads: int) -> list[str]:
    environment = os.environ | {"LATENTRT_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-m", "tests.plugins.cpu_nodes", str(threads)], env=environment, text=True,
                          capture_output=True, check=True)  # fmt: skip
    return done.stdout.split()


def test_results_do_not_depend_on_processor_and_threads():
    """Products have the same bits in every instruction set, and so has attention over whole numbers. Attention over floats
    sums in another order, but not for other threads."""
    first = digests("avx512", 1)
    assert digests("avx512", 2) == digests("avx512", 3) == first
    assert all(digests(isa, 2)[:-3] == first[:-3] for isa in cpu_nodes.ISAS)


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
    files = [Path(__file__).with_name("cpu_sanitized.cpp"), sources / "kernels.cpp", sources / "sampling.cpp"]
    subprocess.run(["g++", *flags, *map(str, files), "-o", str(program)], check=True)
    for isa in cpu_nodes.ISAS:
        done = subprocess.run([program], env=os.environ | {"LATENTRT_CPU_ISA": isa}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
