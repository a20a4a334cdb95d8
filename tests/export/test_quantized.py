"""Quantized weights, against the values of the formats' own tools (tests/quantized) and against formulas in float64."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from latentrt.export.checkpoint import quantized
from latentrt.export.checkpoint.base import Blocks, Part, Source, StoredTensor
from latentrt.export.errors import CheckpointError

FILES = Path(__file__).parents[1] / "quantized"
EXPECTED = json.loads((FILES / "expected.json").read_text())
TOOLS = sorted(name for name in EXPECTED if not name.startswith("gguf"))
DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip
M = "model.layers.0.mlp.up_proj"
FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**32 - 1)


class Weights:
    """What a format makes of `tensors`."""

    def __init__(self, tensors: dict[str, Tensor], config: dict):
        self.tensors = tensors
        headers = {n: StoredTensor(Path("x.safetensors"), tuple(t.shape), DTYPES[t.dtype]) for n, t in tensors.items()}
        self.format = quantized.find(headers, config)
        self.sources: dict[str, Source] = {}
        if self.format is not None:
            self.sources, self.explained = self.format.sources(headers, config, tensors.__getitem__)

    def decode(self, name: str = f"{M}.weight") -> Tensor:
        source = self.sources[name]
        weight = source.decode(*map(self.part, source.parts))
        assert weight.shape == source.shape and weight.dtype == torch.float32
        if source.rows is not None:
            rows = source.rows(*map(self.part, source.parts))
            assert rows.values.dtype in (torch.int8, torch.float8_e4m3fn) and rows.scale.dtype == torch.float32
            torch.testing.assert_close(rows.values.float() * rows.scale[:, None], weight, rtol=2e-7, atol=0)
        if source.blocks is not None and (found := source.blocks.read(*map(self.part, source.parts))):
            assert from_blocks(source.blocks, *found).equal(weight)
        return weight

    def part(self, part: Part) -> Tensor:
        tensor = self.tensors[part.name]
        tensor = tensor if part.index is None else tensor[part.index]
        return tensor if part.rows is None else tensor[part.rows[0] : part.rows[1]]


def from_blocks(blocks: Blocks, values: Tensor, scale: Tensor) -> Tensor:
    """The weight of integers and scales, whose types and ranges must be what `blocks` says."""
    least, cols = -(1 << (blocks.bits - 1)), values.shape[1]
    assert values.dtype == torch.int8 and least <= values.int().min() and values.int().max() < -least
    assert scale.dtype == torch.float32 and scale.shape == (len(values), -(-cols // blocks.size))
    return values.float() * scale.repeat_interleave(blocks.size, 1)[:, :cols]


def bits_of(weight: Tensor) -> str:
    return hashlib.sha256(weight.contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def equal(weight: Tensor, expected: np.ndarray) -> None:
    """`expected` in float64, rounded to float32 once."""
    np.testing.assert_array_equal(weight.numpy(), expected.astype(np.float32))


def stream(values: np.ndarray, bits: int) -> Tensor:
    """int32 [n, count * bits / 32]: every row of `values` as one long number, the first value lowest; ends in zeros."""
    rows = []
    for row in values.tolist():
        number = sum(value << (bits * i) for i, value in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(4 * -(-len(row) * bits // 32), "little"), np.int32))
    return torch.from_numpy(np.stack(rows))


def fp8(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.normal(size=shape)).to(torch.float8_e4m3fn)


def scales(rng: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(rng.uniform(1e-3, 1, shape)).to(dtype)


def wide(tensor: Tensor) -> np.ndarray:
    return tensor.to(torch.float64).numpy()


# The tools' own values


@pytest.mark.parametrize("tool", TOOLS)
def test_equals_the_tools_own_values(tool):
    config = EXPECTED[tool]["quantization_config"]
    weights = Weights(load_file(FILES / f"{tool}.safetensors"), config)
    assert set(weights.sources) == set(EXPECTED[tool]["sha256"])
    assert weights.explained == set(weights.tensors)
    for name, expected in EXPECTED[tool]["sha256"].items():
        weight = weights.decode(name)
        assert bits_of(weight) == expected, name


@pytest.mark.parametrize("tool", [t for t in TOOLS if t != "ct-w4a16-sym"])  # whose bits only the config says
def test_tensors_alone_say_enough(tool):
    weights = Weights(load_file(FILES / f"{tool}.safetensors"), {})
    for name, expected in EXPECTED[tool]["sha256"].items():
        weight = weights.decode(name)
        assert bits_of(weight) == expected


@pytest.mark.parametrize("tool", [t for t in TOOLS if t.startswith(("fp8", "ct-fp8", "ct-w8", "modelopt-fp8"))])
def test_rows_where_a_row_has_one_scale(tool):
    weights = Weights(load_file(FILES / f"{tool}.safetensors"), EXPECTED[tool]["quantization_config"])
    assert all((source.rows is not None) == (tool != "fp8-block") for source in weights.sources.values())


# FP8 and int8


@few
@given(seeds, st.integers(1, 40), st.integers(1, 40), st.sampled_from([(16, 16), (8, 32), (128, 128)]), st.sampled_from("fbe"))
def test_fp8_blocks(seed, out, cols, block, kind):
    rng = np.random.default_rng(seed)
    grid = -(-out // block[0]), -(-cols // block[1])
    scale = scales(rng, *grid, dtype={"f": torch.float32, "b": torch.bfloat16, "e": torch.float8_e8m0fnu}[kind])
    weight = fp8(rng, out, cols)
    config = {"quant_method": "fp8", "weight_block_size": list(block)}
    got = Weights({f"{M}.weight": weight, f"{M}.weight_scale_inv": scale}, config).decode()
    expected = wide(weight)
    for i in range(out):
        for j in range(cols):
            expected[i, j] *= wide(scale)[i // block[0], j // block[1]]
    equal(got, expected)


@pytest.mark.parametrize("inner", [32, 24], ids=["whole blocks", "up begins inside a block"])
def test_fp8_blocks_of_all_experts_in_one_tensor(inner):
    rng, experts, hidden = np.random.default_rng(0), 3, 40
    prefix = "model.layers.1.mlp.experts"
    tensors = {
        f"{prefix}.gate_up_proj": fp8(rng, experts, 2 * inner, hidden),
        f"{prefix}.down_proj": fp8(rng, experts, hidden, inner),
    }
    for name, weight in list(tensors.items()):
        tensors[f"{name}_scale_inv"] = scales(rng, experts, -(-weight.shape[1] // 16), -(-weight.shape[2] // 16))
    weights = Weights(tensors, {"quant_method": "fp8", "weight_block_size": [16, 16]})
    assert len(weights.sources) == 3 * experts and weights.explained == set(tensors)
    for expert in range(experts):
        both, down = (
            wide(tensors[f"{prefix}.{n}"][expert])
            * wide(tensors[f"{prefix}.{n}_scale_inv"][expert]).repeat(16, 0).repeat(16, 1)[: shape[0], : shape[1]]
            for n, shape in (("gate_up_proj", (2 * inner, hidden)), ("down_proj", (hidden, inner)))
        )
        equal(weights.decode(f"{prefix}.{expert}.gate_proj.weight"), both[:inner])
        equal(weights.decode(f"{prefix}.{expert}.up_proj.weight"), both[inner:])
        equal(weights.decode(f"{prefix}.{expert}.down_proj.weight"), down)


def compressed(**weights) -> dict:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


@few
@given(seeds, st.sampled_from(["tensor", "channel", "group", "block"]), st.booleans(), st.booleans())
def test_compressed_tensors_values(seed, strategy, integers, asymmetric):
    rng, out, cols = np.random.default_rng(seed), 24, 40
    weight = torch.from_numpy(rng.integers(-128, 128, (out, cols))).to(torch.int8) if integers else fp8(rng, out, cols)
    area = {"tensor": (out, cols), "channel": (1, cols), "group": (1, 16), "block": (16, 16)}[strategy]
    grid = -(-out // area[0]), -(-cols // area[1])
    scale, zero = scales(rng, *grid, dtype=torch.bfloat16), torch.from_numpy(rng.integers(-128, 128, grid)).to(torch.int8)
    tensors = {f"{M}.weight": weight, f"{M}.weight_scale": scale[0] if strategy == "tensor" else scale}
    asymmetric = asymmetric and integers
    if asymmetric:
        tensors[f"{M}.weight_zero_point"] = zero[0] if strategy == "tensor" else zero
    kind = {"type": "int" if integers else "float", "num_bits": 8, "strategy": strategy}
    weights = Weights(tensors, compressed(**kind, group_size=16, block_structure=[16, 16]))
    rows = np.arange(out)[:, None] // area[0], np.arange(cols)[None] // area[1]
    equal(weights.decode(), (wide(weight) - (wide(zero)[rows] if asymmetric else 0)) * wide(scale)[rows])
    assert (weights.sources[f"{M}.weight"].rows is not None) == (strategy in ("tensor", "channel") and not asymmetric)
    assert weights.explained == set(tensors)


@few
@given(seeds, st.sampled_from([2, 4, 8]), st.sampled_from(["sym", "asym"]), st.sampled_from(["channel", "group", "order"]))
def test_compressed_tensors_packed(seed, bits, zeros, order):
    rng, out, cols, group = np.random.default_rng(seed), 20, 96, 32
    groups = 1 if order == "channel" else cols // group
    half = 1 << (bits - 1)
    stored, zero = rng.integers(0, 2 * half, (out, cols)), rng.integers(0, 2 * half, (out, groups))
    scale = scales(rng, out, groups, dtype=torch.bfloat16)
    which = rng.permutation(np.arange(cols) // group) if order == "order" else np.arange(cols) * groups // cols
    tensors = {
        f"{M}.weight_packed": stream(stored, bits), f"{M}.weight_scale": scale, f"{M}.weight_shape": torch.tensor([out, cols]),
    }  # fmt: skip
    if zeros == "asym":
        tensors[f"{M}.weight_zero_point"] = stream(zero.T, bits).T.contiguous()
    if order == "order":
        tensors[f"{M}.weight_g_idx"] = torch.from_numpy(which).to(torch.int32)
    config = compressed(type="int", num_bits=bits, group_size=None if order == "channel" else group)
    weights = Weights(tensors, config)
    equal(weights.decode(), (stored - (zero[:, which] if zeros == "asym" else half)) * wide(scale)[:, which])
    assert (weights.sources[f"{M}.weight"].blocks is not None) == (zeros == "sym" and order != "order")


def test_compressed_tensors_packs_of_two_widths():
    """Shapes decide where they can; else the names that a scheme targets."""
    rng = np.random.default_rng(0)
    four, eight = rng.integers(0, 16, (8, 64)), rng.integers(0, 256, (8, 64))
    a, b = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"
    scheme = {"type": "int", "strategy": "channel"}
    config = {"quant_method": "compressed-tensors", "config_groups": {
        "a": {"targets": ["re:.*self_attn.*"], "weights": scheme | {"num_bits": 4}},
        "b": {"targets": [b], "weights": scheme | {"num_bits": 8}},
    }}  # fmt: skip
    one = torch.ones(8, 1)
    tensors = {f"{a}.weight_packed": stream(four, 4), f"{b}.weight_packed": stream(eight, 8)}
    weights = Weights(tensors | {f"{a}.weight_scale": one, f"{b}.weight_scale": one}, config)
    equal(weights.decode(f"{a}.weight"), four - 8.0)
    equal(weights.decode(f"{b}.weight"), eight - 128.0)


# FP4


@few
@given(seeds, st.sampled_from(["compressed-tensors", "modelopt", "mxfp4", "mxfp8"]))
def test_four_and_eight_bit_floats_in_small_groups(seed, kind):
    rng, out, cols = np.random.default_rng(seed), 6, 96
    group = 32 if kind.startswith("mx") else 16
    codes = rng.integers(0, 16, (out, cols))
    values = np.array(FP4)[codes]
    packed = torch.from_numpy(codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    whole = torch.tensor([rng.uniform(0.5, 2000)], dtype=torch.float32)
    scale = fp8(rng, out, cols // group).abs()
    name, config = "weight_packed", {"quant_method": "compressed-tensors"}
    if kind == "compressed-tensors":
        more, size = {f"{M}.weight_global_scale": whole}, (scale.float() / whole).double().numpy()
    elif kind == "modelopt":
        name, config = "weight", {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
        more, size = {f"{M}.weight_scale_2": whole[0]}, (scale.float() * whole).double().numpy()
    else:
        exponents = rng.integers(60, 190, (out, cols // group))
        scale, more, size = torch.from_numpy(exponents).to(torch.uint8), {}, 2.0 ** (exponents - 127)
    if kind == "mxfp8":
        name, packed = "weight", fp8(rng, out, cols)
        values = wide(packed)
    weights = Weights({f"{M}.{name}": packed, f"{M}.weight_scale": scale} | more, config)
    exact = values * size.repeat(group, 1)
    rounded = torch.from_numpy(exact.astype(np.float32)).bfloat16().double().numpy()  # the tool's last step
    equal(weights.decode(), rounded if kind == "compressed-tensors" else exact)


def test_modelopt_mixed_precision(tmp_path):
    """An entry of quantized_layers may cover all experts of a layer: tensors decide."""
    rng = np.random.default_rng(0)
    expert, attention, gate = (
        "model.layers.1.mlp.experts.3.up_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.gate",
    )
    tensors = {
        f"{expert}.weight": torch.full((4, 16), 0x21, dtype=torch.uint8), f"{expert}.weight_scale": fp8(rng, 4, 2).abs(),
        f"{expert}.weight_scale_2": torch.tensor(0.5), f"{expert}.input_scale": torch.tensor(2.0),
        f"{attention}.weight": fp8(rng, 4, 8), f"{attention}.weight_scale": torch.tensor(0.25),
        f"{attention}.k_scale": torch.tensor(1.0), f"{gate}.weight": torch.ones(4, 8),
    }  # fmt: skip
    layers = {"model.layers.1.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16}, attention: {"quant_algo": "FP8"}}
    nested = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(nested))
    config = quantized.description(tmp_path, {})
    assert config["quant_method"] == "modelopt"
    weights = Weights(tensors, config)
    assert set(weights.sources) == {f"{expert}.weight", f"{attention}.weight"}
    assert set(tensors) - weights.explained == {f"{gate}.weight"}
    equal(weights.decode(f"{attention}.weight"), wide(tensors[f"{attention}.weight"]) * 0.25)
    scale = wide(tensors[f"{expert}.weight_scale"]).repeat(16, 1) * 0.5
    equal(weights.decode(f"{expert}.weight"), np.tile([0.5, 1.0], (4, 16)) * scale)


@pytest.mark.parametrize("shape", [(), (1,), (130,), (130, 1), (2, 1, 2, 1)], ids=str)
def test_modelopt_fp8_scales_of_any_shape(shape):
    rng = np.random.default_rng(0)
    weight, scale = fp8(rng, 130, 200), scales(rng, *shape)
    got = Weights({f"{M}.weight": weight, f"{M}.weight_scale": scale}, {"quant_method": "modelopt"})
    wider = (
        wide(scale).reshape(2, 2).repeat(128, 0).repeat(128, 1)[:130, :200] if len(shape) == 4 else wide(scale).reshape(-1, 1)
    )
    equal(got.decode(), wide(weight) * wider)
    assert (got.sources[f"{M}.weight"].rows is None) == (len(shape) == 4)


# Integers of AWQ and GPTQ


@few
@given(seeds, st.sampled_from([32, 64, -1]))
def test_awq(seed, group):
    rng, cols, out = np.random.default_rng(seed), 96, 16
    groups = 1 if group == -1 else -(-cols // group)
    which = np.arange(cols) // (cols if group == -1 else group)
    stored, zero = rng.integers(0, 16, (cols, out)), rng.integers(0, 16, (groups, out))
    scale = scales(rng, groups, out, dtype=torch.float16)
    nibble = [8 * w + n for w in range(out // 8) for n in (0, 2, 4, 6, 1, 3, 5, 7)]  # AutoAWQ: nibble n holds this column
    tensors = {f"{M}.qweight": stream(stored[:, nibble], 4), f"{M}.qzeros": stream(zero[:, nibble], 4), f"{M}.scales": scale}
    weights = Weights(tensors, {"quant_method": "awq", "bits": 4, "group_size": group, "version": "GEMM", "zero_point": True})
    equal(weights.decode(), ((stored - zero[which]) * wide(scale)[which]).T)


def gptq(rng, bits: int, zero: np.ndarray, version: int, order: bool) -> tuple[dict[str, Tensor], np.ndarray]:
    """Tensors of a GPTQ module with zero points `zero` [3, out], and its weight."""
    group, out = 32, zero.shape[1]
    cols = 3 * group
    which = rng.permutation(np.arange(cols) // group) if order else np.arange(cols) // group
    stored, scale = rng.integers(0, 1 << bits, (cols, out)), scales(rng, 3, out, dtype=torch.float16)
    qzeros = stream(zero, bits)
    if version == 1:  # whole words minus a one in every value, as GPTQModel does
        qzeros = (qzeros.long() - sum(1 << i for i in range(0, 32, bits))).to(torch.int32)
    tensors = {f"{M}.qweight": stream(stored.T, bits).T.contiguous(), f"{M}.qzeros": qzeros, f"{M}.scales": scale}
    tensors[f"{M}.g_idx"] = torch.from_numpy(which).to(torch.int32)
    return tensors, ((stored - zero[which]) * wide(scale)[which]).T


@few
@given(seeds, st.sampled_from([2, 3, 4, 8]), st.sampled_from([1, 2]), st.booleans())
def test_gptq_asymmetric(seed, bits, version, order):
    rng = np.random.default_rng(seed)
    version = 2 if bits == 3 else version
    tensors, expected = gptq(rng, bits, rng.integers(0, 1 << bits, (3, 32)), version, order)
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": False, "desc_act": order}
    equal(Weights(tensors, config | {"checkpoint_format": "gptq_v2" if version == 2 else "gptq"}).decode(), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("stored", [1, 2])
@pytest.mark.parametrize("said", ["gptq", "gptq_v2", None])
def test_gptq_symmetric_zero_points_say_their_version_themselves(bits, stored, said):
    tensors, expected = gptq(np.random.default_rng(0), bits, np.full((3, 32), 1 << (bits - 1)), stored, False)
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": True}
    weights = Weights(tensors, config | ({"checkpoint_format": said} if said else {}))
    equal(weights.decode(), expected)
    source = weights.sources[f"{M}.weight"]
    assert source.blocks.read(*map(weights.part, source.parts)) is not None


# bitsandbytes


@few
@given(seeds, st.sampled_from(["nf4", "fp4"]), st.booleans(), st.sampled_from(["bfloat16", "float16", "float32"]))
def test_bitsandbytes_four_bits(seed, kind, nested, dtype):
    rng, out, cols, block = np.random.default_rng(seed), 6, 35, 64
    codes, table = rng.integers(0, 16, out * cols), torch.from_numpy(rng.normal(size=16)).float()
    blocks = -(-out * cols // block)
    absmax = scales(rng, blocks)
    state = {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": [out, cols]}
    tensors = {}
    if nested:
        state |= {"nested_blocksize": 2, "nested_dtype": "float32", "nested_offset": 0.125}
        inner, inner_table = scales(rng, -(-blocks // 2)), torch.linspace(-1, 1, 256)
        coded = torch.from_numpy(rng.integers(0, 256, blocks)).to(torch.uint8)
        tensors = {f"{M}.weight.nested_absmax": inner, f"{M}.weight.nested_quant_map": inner_table}
        absmax = inner_table[coded.long()] * inner.repeat_interleave(2)[:blocks] + 0.125
    tensors |= {
        f"{M}.weight": torch.from_numpy(codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None],
        f"{M}.weight.absmax": coded if nested else absmax, f"{M}.weight.quant_map": table,
        f"{M}.weight.quant_state.bitsandbytes__{kind}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }  # fmt: skip
    weights = Weights(tensors, {"quant_method": "bitsandbytes"})
    exact = wide(table)[codes] * wide(absmax).repeat(block)[: out * cols]
    rounded = torch.from_numpy(exact.astype(np.float32)).to(getattr(torch, dtype)).double().numpy()
    equal(weights.decode(), rounded.reshape(out, cols))
    assert weights.explained == set(tensors)


def test_bitsandbytes_int8():
    rng = np.random.default_rng(0)
    weight, scb = torch.from_numpy(rng.integers(-127, 128, (8, 16))).to(torch.int8), scales(rng, 8)
    tensors = {f"{M}.weight": weight, f"{M}.SCB": scb, f"{M}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    got = Weights(tensors, {"quant_method": "bitsandbytes"}).decode()
    np.testing.assert_allclose(got.numpy(), wide(weight) * wide(scb)[:, None] / 127, rtol=3e-7)
    with pytest.raises(CheckpointError, match=r"weight_format: 2; accepted: 0 \(rows\)"):
        Weights(tensors | {f"{M}.weight_format": torch.tensor(2, dtype=torch.uint8)}, {"quant_method": "bitsandbytes"}).decode()


# Which format


@pytest.mark.parametrize("config", [{}, {"quant_method": "fp8"}, {"quant_method": "nobody-knows"}])
def test_a_leftover_config_of_plain_tensors_means_nothing(config):
    assert Weights({f"{M}.weight": torch.ones(2, 2)}, config).format is None


def test_methods_by_name():
    rng = np.random.default_rng(0)
    tensors, _ = gptq(rng, 4, np.full((3, 32), 8), 1, False)
    with pytest.raises(CheckpointError, match=r"quant_method is 'hqq'; accepted: .*fp8.*awq.*start from the unquantized"):
        Weights(tensors, {"quant_method": "hqq"})
    with pytest.raises(CheckpointError, match="quant_method is 'fp8', but the tensors are those of gptq"):
        Weights(tensors, {"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match=r"up_proj.weight: dtype U8 without scales .* quant_method 'quanto'; accepted"):
        Weights({f"{M}.weight": torch.ones(2, 2, dtype=torch.uint8)}, {"quant_method": "quanto"})
    for method in ("gptq", "GPTQ", "gptqmodel"):
        assert Weights(tensors, {"quant_method": method, "bits": 4}).format.__name__.endswith(".gptq")
    fp8_weight = {f"{M}.weight": fp8(rng, 4, 4), f"{M}.weight_scale": torch.tensor(1.0)}
    for method in ("compressed_tensors", "compressed-tensors", "sparseml", "modelopt", "modelopt_fp4", "fp8"):
        assert set(Weights(fp8_weight, {"quant_method": method}).sources) == {f"{M}.weight"}


def test_where_the_config_is(tmp_path):
    def write(name: str, content) -> None:
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))

    assert quantized.description(tmp_path, {}) == {}
    write("hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}})
    found = quantized.description(tmp_path, {})
    assert (found["quant_method"], found["quant_algo"], found["group_size"]) == ("modelopt", "NVFP4", 16)
    write("hf_quant_config.json", {"producer": {}, "quant_method": "modelopt", "quant_algo": "FP8", "quantized_layers": {}})
    assert quantized.description(tmp_path, {})["quant_algo"] == "FP8"
    write("quant_config.json", {"w_bit": 4, "q_group_size": 128, "version": "GEMM"})
    assert quantized.description(tmp_path, {})["quant_method"] == "awq"
    write("quantize_config.json", {"bits": 4, "group_size": 128})
    assert quantized.description(tmp_path, {})["quant_method"] == "gptq"
    inside = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert quantized.description(tmp_path, {"quantization_config": inside}) == inside
    assert quantized.description(tmp_path, {"compression_config": {"quant_method": "sparseml"}}) == {"quant_method": "sparseml"}
    auto_round = {"quant_method": "auto-round", "packing_format": "auto_round:gptqmodel", "bits": 4}
    found = quantized.description(tmp_path, {"quantization_config": auto_round})
    assert (found["quant_method"], found["checkpoint_format"]) == ("gptq", "gptq_v2")
    with pytest.raises(
        CheckpointError, match="packing_format of auto-round is 'auto_round:mlx'; accepted: auto_round:auto_gptq"
    ):
        quantized.description(tmp_path, {"quantization_config": auto_round | {"packing_format": "auto_round:mlx"}})
    with pytest.raises(CheckpointError, match="quantization_config is 'fp8', expected an object"):
        quantized.description(tmp_path, {"quantization_config": "fp8"})
    write("quantize_config.json", "{")
    with pytest.raises(CheckpointError, match=r"quantize_config.json: not readable as JSON"):
        quantized.description(tmp_path, {})


# What is refused


def changed(tool: str, change: Callable[[dict, dict], None]) -> Callable[[], None]:
    def run() -> None:
        tensors = load_file(FILES / f"{tool}.safetensors")
        config = json.loads(json.dumps(EXPECTED[tool]["quantization_config"]))
        change(tensors, config)
        weights = Weights(tensors, config)
        for name in weights.sources:
            weights.decode(name)

    return run


def put(suffix: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict, dict], None]:
    def change(tensors: dict, config: dict) -> None:
        name = next(n for n in sorted(tensors) if n.endswith(suffix))
        tensors[name] = value(tensors[name].clone())

    return change


def drop(suffix: str) -> Callable[[dict, dict], None]:
    return lambda tensors, config: tensors.pop(next(n for n in sorted(tensors) if n.endswith(suffix)))


def say(**fields) -> Callable[[dict, dict], None]:
    return lambda tensors, config: config.update(fields)


def nan_at_0(tensor: Tensor) -> Tensor:
    tensor.view(-1)[0] = math.nan
    return tensor


def scheme(**fields) -> Callable[[dict, dict], None]:
    return lambda tensors, config: next(iter(config["config_groups"].values()))["weights"].update(fields)


def add(name: str) -> Callable[[dict, dict], None]:
    return lambda tensors, config: tensors.update({name: torch.ones(4)})


REFUSED = [
    ("fp8-block", put("scale_inv", lambda t: t[:1]), r"weight_scale_inv .*shape \[1, 2\] beside .*; accepted: .*\[2, 2\]"),
    ("fp8-block", put("scale_inv", nan_at_0), r"weight_scale_inv is not finite at \[0, 0\] \(nan\), 1 such"),
    ("fp8-block", put("scale_inv", lambda t: t.to(torch.int32)), "dtype I32; accepted: F32, BF16, F16, F8_E8M0"),
    ("fp8-block", drop("scale_inv"), "weight_scale_inv is missing: the weight beside it is quantized"),
    ("fp8-block", say(weight_block_size=[64, 64]), r"accepted: .*\[4, 3\]|\[3, 4\]"),
    ("fp8-block", say(weight_block_size=[0, 1]), "weight_block_size is .*two positive numbers"),
    ("fp8-block", say(fmt="e5m2"), "fmt is 'e5m2'; accepted: e4m3"),
    ("ct-fp8-static", say(transform_config={"config_groups": {"u": {}}}), "transform_config.*rotated.*quantize again without"),
    ("ct-fp8-static", say(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config.format is 'sparse-24-bitmask'"),
    ("ct-fp8-static", say(format="marlin-24"), "format is 'marlin-24'; accepted: int-quantized"),
    ("ct-fp8-static", add(f"{M}.bitmask"), "up_proj.bitmask: sparse weights"),
    ("ct-fp8-dynamic", put("weight_scale", lambda t: t[:5]), r"weight_scale.*shape \[5, 1\]"),
    ("ct-fp8-dynamic", say(config_groups=[1]), "config_groups is 'list'; accepted: an object"),
    ("ct-w4a16-sym", scheme(num_bits=3), "under the schemes .*'num_bits': 3.*accepted: one scheme"),
    ("ct-w4a16-sym", drop("weight_scale"), "weight_scale is missing"),
    ("ct-w4a16-sym", put("weight_shape", lambda t: t - 1), r"weight_shape: \[159, 255\]; accepted: \[160, 256\]"),
    ("ct-w4a16-sym", put("weight_scale", nan_at_0), "weight_scale is not finite"),
    ("ct-w4a16-sym", say(config_groups={}), r"under the schemes \[\]"),
    ("ct-nvfp4a16", put("weight_scale", lambda t: t[:, :-1]), r"weight_scale .*shape \[128, 7\]; accepted: \[128, 8\]"),
    ("ct-nvfp4a16", put("global_scale", nan_at_0), "the scale of the whole tensor is not finite"),
    ("ct-nvfp4a16", put("global_scale", torch.zeros_like), "scale of a group is not finite"),
    ("modelopt-fp8", say(quant_algo="W4A16_AWQ"), "quant_algo is 'W4A16_AWQ'; accepted: FP8.*MIXED_PRECISION"),
    ("modelopt-fp8", say(quantized_layers={"a.b": {"quant_algo": "INT4"}}), "quantized_layers.a.b.quant_algo is 'INT4'"),
    ("modelopt-fp8", add(f"{M}.pre_quant_scale"), "pre_quant_scale: inputs scaled.*export again without AWQ"),
    ("modelopt-fp8", drop("weight_scale"), "dtype F8_E4M3 without scales that would explain it, quant_method 'modelopt'"),
    ("modelopt-nvfp4", say(quant_algo="NVFP4", group_size=32), "group_size is 32; accepted: 16 for NVFP4"),
    ("modelopt-nvfp4", drop("weight_scale_2"), r"weight_scale .*dtype F8_E4M3; accepted: U8"),
    ("awq-gemm", say(version="gemv"), "version is 'gemv'; accepted: gemm; quantize again with version gemm"),
    ("awq-gemm", say(bits=8), "bits is 8; accepted: 4"),
    ("awq-gemm", say(group_size=64), r"scales.*shape \[2, 160\]; accepted: \[4, 160\]"),
    ("awq-gemm", say(group_size="all"), "group_size is 'all'; accepted: a positive number"),
    ("awq-gemm", drop("qzeros"), "qzeros is missing"),
    ("awq-gemm", put("scales", nan_at_0), "scales is not finite"),
    ("gptq-v1-desc-act", put("g_idx", lambda t: t + 1), "g_idx: values from 1 to 2; accepted: 0 to 1"),
    ("gptq-v1-desc-act", drop("g_idx"), "g_idx is missing"),
    ("gptq-v1-desc-act", say(checkpoint_format="marlin"), "checkpoint_format is 'marlin'; accepted: gptq, gptq_v2"),
    ("gptq-v1-desc-act", say(bits=5), "where the config says bits 5"),
    ("gptq-v1-desc-act", say(is_marlin_format=True), "is_marlin_format is True"),
    ("gptq-sym", put("qzeros", lambda t: t[:, :-1]), r"qzeros: shape \[1, 15\] for 128 outputs, where the config says bits 4"),
    ("bnb-nf4-dq", drop("__nf4"), r"quant_state.bitsandbytes__nf4 \(or fp4\) is missing"),
    ("bnb-nf4-dq", drop("nested_quant_map"), "nested_quant_map is missing"),
    ("bnb-nf4-dq", put("__nf4", lambda t: t[:-1]), "quant_state.bitsandbytes__nf4: unreadable"),
    ("bnb-nf4-dq", put("weight", lambda t: t[:-1]), r"weight .*shape \[20479, 1\]; accepted: \[20480, 1\] or \[20480\]"),
    ("bnb-nf4-dq", put("nested_absmax", nan_at_0), "nested_absmax is not finite"),
]


@pytest.mark.parametrize(("tool", "change", "message"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_refused_by_name(tool, change, message):
    with pytest.raises(CheckpointError, match=message):
        changed(tool, change)()


def test_awq_for_matrix_times_vector_is_refused_by_its_version():
    tensors = {
        f"{M}.qweight": torch.zeros(16, 4, dtype=torch.int32), f"{M}.qzeros": torch.zeros(16, 1, dtype=torch.int32),
        f"{M}.scales": torch.ones(16, 1).half(),
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="version is 'gemv'; accepted: gemm"):
        Weights(tensors, {"quant_method": "awq", "version": "gemv"})


def test_gptq_needs_a_word_on_its_zero_points():
    rng = np.random.default_rng(0)
    tensors, _ = gptq(rng, 4, rng.integers(0, 16, (3, 32)), 1, False)
    with pytest.raises(CheckpointError, match=r"no word on their version.*add quantize_config.json"):
        Weights(tensors, {}).decode()
    three, _ = gptq(rng, 3, rng.integers(0, 8, (3, 32)), 2, False)
    with pytest.raises(CheckpointError, match=r"asymmetric 3-bit weights of version 1; accepted: version 2"):
        Weights(three, {"quant_method": "gptq", "bits": 3, "sym": False}).decode()
