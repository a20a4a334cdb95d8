"""Packed cache formats against the published layouts, formulas in float64, numpy's own bits, and the CPU's kernels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.plugins import cache_formats
from latentrt.plugins.cache_formats import fp8, integers, rotation, words

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
PACKED = [f.name for f in (*fp8.FORMATS, *integers.FORMATS)]
SIZES = st.tuples(st.integers(1, 18).map(lambda n: 32 * n), st.integers(1, 9).map(lambda n: 8 * n))
# What rounding to the nearest of 2^b levels can be off by, as a part of the largest of a group: half a step of the widest scale
# (all levels but one on either side), and the float16 scale's own half step. e4m3 has three bits behind the first.
HALF_STEPS = {6: 0.5 / 31, 8: 0.5 / 127, 4: 0.5 / 7}
# Clipped scales make the largest elements' error larger than half a step: by GRID's last, all that is beyond the highest code.
CLIPPED = {b: max(HALF_STEPS[b], 1 - (2 ** (b - 1) - 1) / grid[-1]) for b, grid in integers.GRID.items()}


@pytest.mark.parametrize(("name", "size"), [("fp8", 656), ("int6", 452), ("int6r", 436), ("int4", 340), ("bfloat16", 1152)])
def test_bytes_of_a_token_of_the_family(name, size):
    """The paper's sizes are those of 512 + 64 elements; 436 bytes are -93.28 % of DeepSeek 67B's cache."""
    assert cache_formats.get(name).bytes_per_token(512, 64) == size
    if name == "int6r":
        assert 1 - 60 * size / (95 * 2 * 8 * 128 * 2) == pytest.approx(0.9328, abs=5e-5)


@SETTINGS
@given(st.sampled_from([2, 4, 6, 8]), st.integers(1, 70), st.integers(0, 2**32))
def test_words_are_numpys_bits(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (3, count))
    packed = words.pack(torch.from_numpy(codes), bits)
    assert packed.shape == (3, words.word_count(count, bits)) and packed.dtype == torch.int32
    assert words.unpack(packed, bits, count).numpy().tolist() == codes.tolist()
    planes = [(codes, bits)] if bits != 6 else [(codes & 15, 4), (codes >> 4, 2)]
    expected = b""
    for row in [[p[0][0] for p in planes]]:
        for plane, (_, width) in zip(row, planes, strict=True):
            stream = "".join(format(int(code), f"0{width}b")[::-1] for code in plane)
            stream += "0" * (-len(stream) % 32)
            expected += np.packbits(np.array([int(b) for b in stream]), bitorder="little").tobytes()
    assert packed[0].numpy().tobytes() == expected


@SETTINGS
@given(st.sampled_from(PACKED), SIZES, st.sampled_from([1e-3, 1.0, 1e3]), st.integers(0, 2**32))
def test_what_packed_formats_keep(name, sizes, spread, seed):
    layout, rng = cache_formats.get(name), np.random.default_rng(seed)
    latent, k_pe = (torch.from_numpy(rng.standard_normal((4, n), dtype=np.float32)) * spread for n in sizes)
    rows = layout.encode(latent, k_pe)
    assert rows.shape == (4, layout.width(*sizes)) and rows.dtype == torch.int32
    for kept, given_, bits in zip(layout.decode(rows, *sizes), (latent, k_pe), part_bits(layout), strict=True):
        off = (kept - given_).abs()
        if bits == "e4m3":
            assert (off <= given_.abs() / 16 + given_.abs().amax(-1, keepdim=True) / 448 / 64).all()
        elif bits == "bfloat16":
            assert (off <= given_.abs() / 256).all()
        else:
            assert (off <= given_.abs().amax(-1, keepdim=True) * (CLIPPED[bits] + 1e-3)).all()
            assert off.pow(2).mean().sqrt() <= given_.abs().max() * HALF_STEPS[bits]


def part_bits(layout) -> tuple:
    return ("e4m3", "bfloat16") if layout.name == "fp8" else (layout.latent_bits, layout.rope_bits)


@pytest.mark.parametrize("name", PACKED)
def test_extremes_in_a_packed_cache(name):
    """Zeros stay zeros; tiny and huge numbers stay finite; NaN and infinity do not become numbers that look right."""
    layout = cache_formats.get(name)
    decode = lambda x: layout.decode(layout.encode(x, torch.zeros(1, 8)), 64, 8)[0]  # noqa: E731
    assert (decode(torch.zeros(1, 64)) == 0).all()
    for size in (1e-30, 1e5):
        assert decode(torch.full((1, 64), size)).isfinite().all()
    for value in (float("nan"), float("inf")):
        found = decode(torch.cat([torch.tensor([[value]]), torch.ones(1, 63)], -1))
        assert not found[0, 0].isfinite()


@SETTINGS
@given(st.sampled_from([4, 6]), st.integers(1, 16).map(lambda n: 32 * n), st.integers(0, 2**32))
def test_searched_scales_are_never_worse_than_the_usual_one(bits, count, seed):
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((5, count), dtype=np.float32))
    codes, scale = words.quantize(x, bits, integers.GRID[bits])
    half = 1 << bits - 1
    usual = (x.abs().amax(-1) / (half - 1)).half().float()[:, None]
    plain = ((x / usual).round().clamp(-half, half - 1) * usual - x).double().square().sum(-1)
    searched = ((codes - half) * scale.float()[:, None] - x).double().square().sum(-1)
    assert (searched <= plain * (1 + 1e-6)).all()


@SETTINGS
@given(st.integers(1, 20).map(lambda n: 32 * n))
def test_the_rotation_is_a_hadamard_matrix_in_blocks(size):
    turned = rotation.rotate(torch.eye(size, dtype=torch.float64))
    block = size & -size
    signs = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(block)] for i in range(block)], dtype=torch.float64)
    expected = torch.block_diag(*[signs / block**0.5] * (size // block))
    torch.testing.assert_close(turned, expected)
    torch.testing.assert_close(rotation.rotate(turned), torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(rotation.rotate(expected[:, :3], 0), torch.eye(size, dtype=torch.float64)[:, :3])
