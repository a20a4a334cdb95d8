"""Models of one node with its weights inside, for ONNX Runtime's kernels and for our own; and digests of what ours compute.

    python -m tests.plugins.cpu_nodes THREADS

prints the digest of one result per line. Tests compare lines between processes with other $LATENTRT_CPU_ISA or THREADS.
"""

import hashlib
import sys
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper, numpy_helper

from latentrt.export.lowering.onnxruntime import native
from latentrt.plugins import cache_formats
from latentrt.plugins.contract import DOMAIN
from latentrt.plugins.cpu import compile
from latentrt.plugins.onnx_function import MICROSOFT, bodies

OPSETS = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1), helper.make_opsetid(MICROSOFT, 1)]
ISAS = ("scalar", "avx2", "avxvnni", "avx512")


def model(nodes, inputs: dict, weights: dict, outputs: list[str], free: dict | None = None, between=()) -> onnx.ModelProto:
    """`inputs` and `weights` are arrays; `free` says which axes of an input have names instead of sizes. `between`: shapes."""
    values = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(x.dtype),
            [(free or {}).get(name, {}).get(k, n) for k, n in enumerate(x.shape)],
        )
        for name, x in inputs.items()
    ]  # fmt: skip
    made = helper.make_graph(
        nodes, "one", values, [helper.make_empty_tensor_value_info(o) for o in outputs],
        [numpy_helper.from_array(w, name) for name, w in weights.items()], value_info=between,
    )  # fmt: skip
    found = helper.make_model(made, opset_imports=OPSETS, ir_version=11)
    found.functions.extend(bodies(found))
    return found


def session(found: onnx.ModelProto, own: bool, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    copy = onnx.ModelProto.FromString(found.SerializeToString())
    if own:
        assert native.replace(copy) and not copy.functions
        options.register_custom_ops_library(str(compile.library()))
    return ort.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(found: onnx.ModelProto, inputs: dict, own: bool = True, threads: int = 1) -> list[np.ndarray]:
    return session(found, own, threads).run(None, inputs)


def quantized(rng, *shape: int, block: int, bits: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random weights [..., outputs, inputs]: stored [..., outputs, blocks, block * bits / 8], their scales, the real ones."""
    *outer, inputs = shape
    blocks = -(-inputs // block)
    q = rng.integers(1, 1 << bits, (*outer, blocks, block), dtype=np.uint8)
    q.reshape(*outer, blocks * block)[..., inputs:] = 1 << (bits - 1)
    scale = (rng.random((*outer, blocks), dtype=np.float32) + 0.1) / (1 << bits)
    real = ((q.astype(np.float64) - (1 << (bits - 1))) * scale[..., None]).reshape(*outer, -1)[..., :inputs]
    stored = q if bits == 8 else q[..., 0::2] | (q[..., 1::2] << 4)
    return stored, scale, real


def rounded(x: np.ndarray, block: int) -> np.ndarray:
    """Rows of x as our products see them: int8 with one scale a row and block, in float64."""
    inputs = x.shape[-1]
    blocks = -(-inputs // block)
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -inputs % block)]).reshape(*x.shape[:-1], blocks, block)
    largest = np.abs(padded).max(-1, keepdims=True).astype(np.float32)
    factor = np.where(largest > 1e-35, np.float32(127) / np.maximum(largest, np.float32(1e-38)), 0).astype(np.float32)
    q = np.rint(padded.astype(np.float32) * factor).astype(np.float64)
    return (q * (largest / np.float32(127))).reshape(*x.shape[:-1], blocks * block)[..., :inputs]


def panels(name: str, rows: np.ndarray, axis: int) -> tuple[np.ndarray, list[onnx.NodeProto], dict]:
    """Weights or scales by rows, with outputs at `axis`, as panels of 16; the nodes that make `<name>` of `<name>.panels`.

    With an axis before the outputs, inputs are one axis in the end, as experts have them.
    """
    outputs, weights = rows.shape[axis], rows.dtype == np.uint8
    panels = -(-outputs // 16)
    filled = np.zeros((*rows.shape[:axis], panels * 16, *rows.shape[axis + 1 :]), rows.dtype)
    filled[(slice(None),) * axis + (slice(outputs),)] = rows
    turned = filled.reshape(*rows.shape[:axis], panels, 16, rows.shape[axis + 1], *([-1, 4] if weights else []))
    lanes = turned.ndim - (2 if weights else 1)
    stored = np.moveaxis(turned, axis + 1, lanes)
    order = [k for k in range(stored.ndim) if k != lanes]
    order.insert(axis + 1, lanes)
    steps = [("Transpose", [], {"perm": order}), ("Reshape", ["filled"], {}), ("Slice", ["begin", "end", "axis"], {})]
    made = [
        helper.make_node(op, [f"{name}.{k or 'panels'}", *(f"{name}.{x}" for x in rest)],
                         [f"{name}.{k + 1}" if k < 2 else name], **given)
        for k, (op, rest, given) in enumerate(steps)
    ]  # fmt: skip
    shape = (*filled.shape[: axis + 1], -1) if axis else filled.shape
    numbers = {"filled": shape, "begin": [0], "end": [outputs], "axis": [axis]}
    return stored, made, {f"{name}.{k}": np.array(v, np.int64) for k, v in numbers.items()}


def in_panels(weights: dict[str, np.ndarray], axis: int) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Nodes and initializers that give these weights and scales by rows."""
    nodes, stored = [], {}
    for name, rows in weights.items():
        found, made, numbers = panels(name, rows, axis)
        nodes, stored = nodes + made, stored | {f"{name}.panels": np.ascontiguousarray(found)} | numbers
    return nodes, stored


def linear(rng, rows: int, inputs: int, outputs: int, block: int, bits: int = 8, bias: bool = False):
    """(model, inputs, real weights, bias) of a MatMulNBits with int8 activations."""
    q, scale, real = quantized(rng, outputs, inputs, block=block, bits=bits)
    x = rng.standard_normal((rows, inputs), dtype=np.float32)
    nodes, weights = in_panels({"w": q, "s": scale}, 0)
    weights |= {"b": rng.standard_normal(outputs, dtype=np.float32)} if bias else {}
    names = ["x", "w", "s", *(["", "", "b"] if bias else [])]
    node = helper.make_node("MatMulNBits", names, ["y"], domain=MICROSOFT, K=inputs, N=outputs, bits=bits, block_size=block,
                            accuracy_level=4)  # fmt: skip
    return model([*nodes, node], {"x": x}, weights, ["y"], {"x": {0: "T"}}), {"x": x}, real, weights.get("b", 0)


def products(rng, x: str, inputs: int, **sizes: tuple[int, int, int]):
    """Nodes, initializers and real weights of MatMulNBits with int8 activations: name -> (outputs, block, bits)."""
    nodes, weights, reals = [], {}, {}
    for name, (outputs, block, bits) in sizes.items():
        q, scale, reals[name] = quantized(rng, outputs, inputs, block=block, bits=bits)
        made, stored = in_panels({f"{name}.w": q, f"{name}.s": scale}, 0)
        weights |= stored
        given = {"K": inputs, "N": outputs, "bits": bits, "block_size": block, "accuracy_level": 4}
        names = [x, f"{name}.w", f"{name}.s"]
        nodes += [*made, helper.make_node("MatMulNBits", names, [name], name=name, domain=MICROSOFT, **given)]
    return nodes, weights, reals


def gated(rng, rows: int, inputs: int, inner: int, outputs: int, block: int, bits: int, down_bits: int):
    """(model, inputs, real weights by name) of a gated MLP."""
    x = rng.standard_normal((rows, inputs), dtype=np.float32)
    nodes, weights, reals = products(rng, "x", inputs, gate=(inner, block, bits), up=(inner, block, bits))
    nodes += [helper.make_node("Sigmoid", ["gate"], ["s"]), helper.make_node("Mul", ["gate", "s"], ["silu"]),
              helper.make_node("Mul", ["silu", "up"], ["inner"])]  # fmt: skip
    more, stored, real = products(rng, "inner", inner, y=(outputs, block, down_bits))
    return model([*nodes, *more], {"x": x}, weights | stored, ["y"], {"x": {0: "T"}}), {"x": x}, reals | real


def pair(rng, rows: int, inputs: int, first: tuple[int, int, int], second: tuple[int, int, int]):
    """(model, inputs, real weights) of two products of the same: (outputs, block, bits) each."""
    x = rng.standard_normal((rows, inputs), dtype=np.float32)
    nodes, weights, reals = products(rng, "x", inputs, y=first, z=second)
    return model(nodes, {"x": x}, weights, ["y", "z"], {"x": {0: "T"}}), {"x": x}, reals


def experts(rng, tokens: int, count: int, top_k: int, hidden: int, inner: int, block: int, first: int = 0,
            bits: int = 8):  # fmt: skip
    """(model, inputs, real weights) of MoeExperts with scales per block; -1 in some rows."""
    gate_up, gate_up_scale, real_gate_up = quantized(rng, count, 2 * inner, hidden, block=block, bits=bits)
    down, down_scale, real_down = quantized(rng, count, hidden, inner, block=block, bits=bits)
    total = count + first + 1
    ids = rng.permuted(np.tile(np.arange(total, dtype=np.int32), (tokens, 1)), axis=1)[:, :top_k].copy()
    weights = rng.random((tokens, top_k), dtype=np.float32)
    padding = rng.random(tokens) < 0.2
    ids[padding], weights[padding] = -1, 0
    inputs = {"x": rng.standard_normal((tokens, hidden), dtype=np.float32), "ids": ids, "weights": weights}
    weights = {"gate_up": gate_up, "down": down, "gate_up_scale": gate_up_scale, "down_scale": down_scale}
    nodes, stored = in_panels(weights, 1)
    node = helper.make_node("MoeExperts", [*inputs, *weights], ["y"], domain=DOMAIN, first_expert=first,
                            gate_up_layout="interleaved", packed=8 // bits)  # fmt: skip
    free = {name: {0: "T"} for name in inputs}
    between = [
        helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(w.dtype), w.reshape(*w.shape[:2], -1).shape)
        for k, w in weights.items()
    ]
    return model([*nodes, node], inputs, stored, ["y"], free, between), inputs, (real_gate_up, real_down)


@dataclass(frozen=True)
class MlaCase:
    """A model of one Mla node and what a formula needs beside its inputs."""

    model: onnx.ModelProto
    feeds: dict[str, np.ndarray]
    w_uk: np.ndarray  # [heads, rank, nope]: quantized, then real
    w_uk_scale: np.ndarray  # [heads, rank], where blocks hold all of nope
    w_uv: np.ndarray  # [heads, v, rank]
    block: int  # of inputs of w_uv
    layout: cache_formats.CacheFormat


def mla(rng, sequences, page_size: int, heads: int, rank: int, nope: int, rope: int, v: int, padding: int = 0,
        cache_format: str = "float32", form: str = "auto", block: int = 128) -> MlaCase:  # fmt: skip
    """(past, new) of each sequence; shuffled pages. Where nothing is cached there is NaN, of elements or of packed scales."""
    rows = sum(new for _, new in sequences)
    counts = [-(-(past + new) // page_size) for past, new in sequences]
    free = list(1 + rng.permutation(sum(counts)))
    layout = cache_formats.get(cache_format)
    cache = np.full((sum(counts) + 2, page_size, layout.width(rank, rope) * layout.dtype.itemsize), 255, np.uint8)
    cache = cache.view(str(layout.dtype).removeprefix("torch."))
    table = np.full((len(sequences), max(counts) + 1), sum(counts) + 1, np.int32)
    for b, (past, _) in enumerate(sequences):
        table[b, : counts[b]] = [free.pop() for _ in range(counts[b])]
        for p in range(past):
            token = torch.from_numpy(rng.standard_normal(rank + rope, dtype=np.float32)).split([rank, rope])
            cache[table[b, p // page_size], p % page_size] = layout.encode(*token).numpy()
    w_uk, w_uk_scale, real_uk = quantized(rng, heads, rank, nope, block=block)
    w_uv, w_uv_scale, real_uv = quantized(rng, heads, v, rank, block=block)
    angles = rng.random((rows + padding, rope // 2), dtype=np.float32) * 6
    feeds = {
        "q": rng.standard_normal((rows + padding, heads * (nope + rope)), dtype=np.float32) / 4,
        "kv": rng.standard_normal((rows + padding, rank + rope), dtype=np.float32),
        "norm": rng.standard_normal(rank, dtype=np.float32), "cos": np.cos(angles), "sin": np.sin(angles),
        "cache": cache, "block_table": table,
        "cached_lengths": np.array([past for past, _ in sequences], np.int32),
        "query_starts": np.cumsum([0, *(new for _, new in sequences)]).astype(np.int32),
        "num_tokens": np.array([rows], np.int32),
    }  # fmt: skip
    weights = {"uk": panels("uk", w_uk, 1)[0], "uk.scale": panels("uk", w_uk_scale, 1)[0], "uv": panels("uv", w_uv, 1)[0],
               "uv.scale": panels("uv", w_uv_scale, 1)[0]}  # fmt: skip
    weights = {name: np.ascontiguousarray(w) for name, w in weights.items()}
    given = {"softmax_scale": 0.2, "epsilon": 1e-6, "v_head_dim": v, "cache_format": cache_format}
    op_type = {"float32": "Mla", "float16": "MlaHalf"}.get(cache_format, "MlaPacked")
    node = helper.make_node(op_type, [*feeds, *weights], ["attended", "cache_out"],
                            domain=native.CPU_DOMAIN, form=form, **given)  # fmt: skip
    dynamic = {name: {0: "T"} for name in ("q", "kv", "cos", "sin")} | {"cache": {0: "P"}, "block_table": {0: "B", 1: "M"}}
    dynamic |= {"cached_lengths": {0: "B"}, "query_starts": {0: "B + 1"}}
    made = model([node], feeds, weights, ["attended", "cache_out"], dynamic)
    return MlaCase(made, feeds, real_uk, w_uk_scale[..., 0], real_uv, block, layout)


def main(threads: int) -> None:
    rng = np.random.default_rng(0)
    cases = [linear(rng, rows, 300, 70, block, bits)[:2] for rows in (1, 7) for block in (128, 64) for bits in (8, 4)]
    cases += [experts(rng, tokens, 5, 3, 256, 128, 64)[:2] for tokens in (1, 9)]
    sizes = 64, 16, 64, 32, 16, 32
    attention = [mla(rng, [(600, 1), (4, 3)], *sizes, cache_format=name) for name in ("int6", "int6r", "int4", "fp8")]
    attention += [mla(rng, [(600, 1), (0, 3)], *sizes), mla(rng, [(300, 40)], *sizes, form="expanded")]
    for found, inputs in cases + [(case.model, case.feeds) for case in attention]:
        print(hashlib.sha256(run(found, inputs, threads=threads)[0].tobytes()).hexdigest())


if __name__ == "__main__":
    main(int(sys.argv[1]))
