"""Packed cache formats in ONNX's operations, run by ONNX Runtime, against the torch codecs."""

from functools import cache

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from latentrt.plugins import cache_formats
from latentrt.plugins.cache_formats import integers, onnx_codec, words
from latentrt.plugins.contract import DOMAIN
from latentrt.plugins.onnx_function import MICROSOFT, OpCall, set_opset

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
SIZES = [(32, 8), (96, 8), (160, 16), (512, 64)]
# Squared errors of two scales may differ by float32's rounding of 512 summands, and the sum's order decides then.
TIE = 1e-5


@cache
def codec(name: str, rank: int, rope: int) -> tuple[ort.InferenceSession, ort.InferenceSession]:
    call = OpCall({"cache_format": name}, {}, {"latent": (None, rank), "k_pe": (None, rope)})
    functions = onnx_codec.functions(call)
    types = {"latent": TensorProto.FLOAT, "k_pe": TensorProto.FLOAT, "cells": TensorProto.INT32}
    like = {"EncodeCells": TensorProto.INT32, "DecodeCells": TensorProto.FLOAT}
    found = []
    for function in functions:
        inputs = [helper.make_tensor_value_info(n, types.get(n, like[function.name]), None) for n in function.input]
        output = helper.make_empty_tensor_value_info("y")
        node = helper.make_node(function.name, list(function.input), ["y"], domain=DOMAIN)
        opsets = [helper.make_opsetid(domain, 1) for domain in ("", DOMAIN, MICROSOFT)]
        model = helper.make_model(helper.make_graph([node], "one", inputs, [output]), opset_imports=opsets, ir_version=11)
        model.functions.append(function)
        set_opset(model, model.functions)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        found.append(ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]))
    return tuple(found)


def encode(name: str, latent: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
    session, _ = codec(name, latent.shape[-1], k_pe.shape[-1])
    feeds = {"latent": latent.numpy(), "k_pe": k_pe.numpy(), "like": np.zeros(0, np.int32)}
    return torch.from_numpy(session.run(None, feeds)[0])


def decode(name: str, rows: torch.Tensor, rank: int, rope: int) -> list[torch.Tensor]:
    _, session = codec(name, rank, rope)
    found = torch.from_numpy(session.run(None, {"cells": rows.numpy(), "like": np.zeros(0, np.float32)})[0])
    return list(found.split([rank, rope], -1))


def squared_errors(layout, rows: torch.Tensor, token: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Of every group of rows, in float64: [T, groups]."""
    sizes, parts = [x.shape[-1] for x in token], []
    for field, found, x in zip(("latent", "k_pe"), layout.decode(rows, *sizes), token, strict=True):
        group = next(f.group for f in layout.fields(*sizes) if f.name == field) or x.shape[-1]
        parts.append((found.double() - x.double()).square().unflatten(-1, (-1, group)).sum(-1))
    return torch.cat(parts, -1)


def assert_encoded(name: str, found: torch.Tensor, latent: torch.Tensor, k_pe: torch.Tensor) -> int:
    """Words are the torch codec's but in rows where two scales are equally good; returns how many those are."""
    layout = cache_formats.get(name)
    expected = layout.encode(latent, k_pe)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    tied = (found != expected).any(-1)
    if tied.any():
        assert layout.kernel == "integers"
        mine, theirs = (squared_errors(layout, rows[tied], (latent[tied], k_pe[tied])) for rows in (found, expected))
        torch.testing.assert_close(mine, theirs, rtol=TIE, atol=0)
    return int(tied.sum())


@SETTINGS
@given(st.sampled_from(cache_formats.PACKED), st.sampled_from(SIZES), st.sampled_from([1e-42, 1e-30, 1e-6, 1e-3, 1.0, 1e3]),
       st.sampled_from([1, 30]), st.integers(0, 5), st.integers(0, 2**32))  # fmt: skip
def test_tokens_have_the_torch_codecs_words(name, sizes, spread, outlier, count, seed):
    rng = np.random.default_rng(seed)
    latent, k_pe = (torch.from_numpy(rng.standard_normal((count, n), dtype=np.float32)) * spread for n in sizes)
    latent[:, 3] *= outlier
    latent[1:2], k_pe[2:3] = 0, 0
    found = encode(name, latent, k_pe)
    assert_encoded(name, found, latent, k_pe)
    if not count:  # torch cannot look at the bits of nothing
        assert [x.shape for x in decode(name, found, *sizes)] == [(0, n) for n in sizes]
        return
    for mine, theirs in zip(decode(name, found, *sizes), cache_formats.get(name).decode(found, *sizes), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", cache_formats.PACKED)
def test_equally_good_scales_are_rare(name):
    """The exception that `assert_encoded` makes, counted."""
    g = torch.Generator().manual_seed(1)
    latent, k_pe = torch.randn(4000, 512, generator=g), torch.randn(4000, 64, generator=g)
    assert assert_encoded(name, encode(name, latent, k_pe), latent, k_pe) <= 4


@pytest.mark.parametrize("name", cache_formats.PACKED)
def test_any_words_decode_to_the_torch_codecs_values(name):
    """Random bits: every code, and scales that are subnormal, huge, infinite or NaN."""
    rows = torch.from_numpy(np.random.default_rng(2).integers(-(2**31), 2**31, (500, cache_formats.get(name).width(160, 16))))
    found = decode(name, rows.int(), 160, 16)
    for mine, theirs in zip(found, cache_formats.get(name).decode(rows.int(), 160, 16), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


def test_every_word_of_a_plane_decodes_and_encodes_to_itself():
    """All codes of 8 bits, and all values that a scale of 1 leaves as they are."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.int32)[None]  # 64 words: a latent of 256 in e4m3
    rows = torch.cat([codes, torch.tensor([[1.0, 1.0]]).view(torch.int32), torch.zeros(1, 4, dtype=torch.int32)], -1)
    values, k_pe = decode("fp8", rows, 256, 8)
    assert torch.equal(values.nan_to_num(7), codes.view(torch.float8_e4m3fn).float().nan_to_num(7))
    finite = values.isfinite()
    again = encode("fp8", torch.where(finite, values, values[:, :1]), k_pe)
    octets = again[:, :64].contiguous().view(torch.uint8)
    assert torch.equal(octets[finite], codes.view(torch.uint8)[finite])


def test_e4m3_rounds_half_to_even_as_torch_does():
    """Every number of the format, every point between two, and their neighbours in float32, of both signs."""
    table = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    between = (table[1:] + table[:-1]) / 2
    points = torch.cat([table, between]).numpy().astype(np.float32)
    points = np.concatenate([points, np.nextafter(points, np.float32(448)), np.nextafter(points, np.float32(-448))])
    points = np.concatenate([points, -points])
    rows = np.zeros((-(-len(points) // 127), 128), np.float32)
    rows[:, 0] = 448  # a scale of 1
    rows[:, 1:].flat[: len(points)] = points
    latent, k_pe = torch.from_numpy(rows), torch.zeros(len(rows), 8)
    assert torch.equal(encode("fp8", latent, k_pe), cache_formats.get("fp8").encode(latent, k_pe))


@pytest.mark.parametrize("steps", [31.0, 7.0])
def test_halves_of_a_step_are_rounded_to_even(steps):
    """Elements at k + 1/2 steps of a scale of 1: the first candidate is chosen where nothing else is better."""
    name = "int6" if steps == 31 else "int4"
    latent = torch.arange(-64, 64).div(4).clamp(-steps, steps).repeat(1, 4)
    latent[:, ::64] = steps
    k_pe = torch.arange(8)[None] - 3.5
    assert torch.equal(encode(name, latent, k_pe), cache_formats.get(name).encode(latent, k_pe))


@pytest.mark.parametrize("name", cache_formats.PACKED)
@pytest.mark.parametrize("place", [0, 77, 159])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e38, 2.2e6, 5e5, 1e5, 1e-45])
def test_what_is_no_number_becomes_what_torch_makes_of_it(name, value, place):
    """Decoded, since NaN has many bits; the other groups' words are untouched. A NaN at the end is not lost in a maximum.

    Of 2.2e6 (6 bits) and 5e5 (4 bits) the first scales are infinite, and later ones are not.
    """
    latent, k_pe = torch.randn(2, 160, generator=torch.Generator().manual_seed(3)), torch.ones(2, 16)
    latent[0, place] = k_pe[1, 5] = value
    found, expected = encode(name, latent, k_pe), cache_formats.get(name).encode(latent, k_pe)
    decoded = (cache_formats.get(name).decode(rows, 160, 16) for rows in (found, expected))
    for mine, theirs in zip(*decoded, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


def test_of_two_scales_that_are_equally_good_the_first_is_taken():
    """-56 is 7 steps of 8 and 8 steps of 7, both without error."""
    latent, k_pe = torch.zeros(1, 128), torch.zeros(1, 8)
    latent[0, [5, 70]] = -56.0
    found = encode("int4", latent, k_pe)
    assert torch.equal(found, cache_formats.get("int4").encode(latent, k_pe))
    scales = found[:, -2:].contiguous().view(torch.float16)[0]
    assert scales[:2].tolist() == [8.0, 8.0]


def test_a_group_of_subnormal_numbers_saturates():
    """A scale that rounds down makes them more than 448 times itself."""
    latent, k_pe = torch.full((1, 128), 9e-43), torch.zeros(1, 8)
    scale = latent.amax() / 448
    assert (latent / scale).max() > 465 and scale > 0
    assert torch.equal(encode("fp8", latent, k_pe), cache_formats.get("fp8").encode(latent, k_pe))


def test_the_search_takes_a_clipped_scale_where_it_is_better():
    """Guards the test above against a search that always takes the first: most random groups take another."""
    latent, k_pe = torch.randn(200, 512, generator=torch.Generator().manual_seed(4)), torch.zeros(200, 8)
    scales = encode("int6", latent, k_pe)[:, -1:].contiguous().view(torch.float16)[:, 0].float()
    first = (latent.abs().amax(-1) / integers.GRID[6][0]).half().float()
    assert (scales < first).float().mean() > 0.5 and scales.min() > words.SMALLEST
