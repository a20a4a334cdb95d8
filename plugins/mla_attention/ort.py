"""Body of `mla_attention` for ONNX Runtime: an ONNX function of standard ops over the paged cache and ragged rows.

New tokens enter the cache by ScatterND, which ONNX Runtime does in place when input and output are bound to one buffer.
A Loop then takes the sequences one by one, so nothing is padded: gather the rows of its pages once, and two matrix
products. Scores are computed transposed (keys times queries), which spares a transposition of the gathered keys.
EncodeCells and DecodeCells are the cache format's own (plugins/cache_formats/onnx_codec.py).
"""

import onnx
from onnxscript import script, values
from onnxscript.onnx_opset import opset23 as op

from latentrt.plugins.cache_formats import onnx_codec
from latentrt.plugins.contract import DOMAIN, VERSION
from latentrt.plugins.onnx_function import OpCall

_DOMAIN = values.Opset(DOMAIN, VERSION)
_INT64 = onnx.TensorProto.INT64
_END = 2**63 - 1


def body(call: OpCall) -> list[onnx.FunctionProto]:
    """For any cache format; computation in the queries' dtype (float32 on the CPU)."""
    return [MlaAttention.to_function_proto(), *onnx_codec.functions(call)]


@script(_DOMAIN, default_opset=op)
def MlaAttention(  # noqa: N802 (the name is the op's, the parameters are its inputs)
    q_latent, q_pe, latent, k_pe, cache, block_table, cached_lengths, query_starts, num_tokens,
    softmax_scale: float, cache_format: str,
):  # fmt: skip
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    minus_one = op.Constant(value_ints=[-1])
    first_axis = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    tokens = op.Shape(q_latent, start=0, end=1)
    page_size = op.Shape(cache, start=1, end=2)
    rank = op.Shape(q_latent, start=2, end=3)
    count = op.Cast(num_tokens, to=_INT64)
    starts = op.Min(op.Cast(query_starts, to=_INT64), count)
    cached = op.Cast(cached_lengths, to=_INT64)
    table = op.Cast(block_table, to=_INT64)

    row = op.Range(first_axis, op.Squeeze(tokens), step)
    valid = op.Less(row, count)
    ends = op.Slice(starts, one, op.Constant(value_ints=[_END]), zero)
    ended = op.GreaterOrEqual(op.Unsqueeze(row, one), op.Unsqueeze(ends, zero))  # [T, B]: sequence b ends before row t
    owner = op.Where(valid, op.ReduceSum(op.Cast(ended, to=_INT64), one, keepdims=0), zero)  # [T]
    position = op.Where(valid, op.Sub(op.Add(op.Gather(cached, owner), row), op.Gather(starts, owner)), zero)
    entry = op.Concat(op.Unsqueeze(owner, one), op.Unsqueeze(op.Div(position, page_size), one), axis=1)
    page = op.Where(valid, op.GatherND(table, entry), zero)
    slot = op.Concat(op.Unsqueeze(page, one), op.Unsqueeze(op.Mod(position, page_size), one), axis=1)
    cache_out = op.ScatterND(cache, slot, _DOMAIN.EncodeCells(latent, k_pe, cache))

    width = op.Shape(cache, start=2, end=3)
    flat = op.Reshape(cache_out, op.Concat(minus_one, width, axis=0))  # [num_pages * page_size, width]
    query = op.Concat(q_latent, q_pe, axis=-1)  # [T, H, rank + rope]
    length = op.Shape(query, start=2, end=3)
    slots = op.Range(first_axis, op.Squeeze(page_size), step)
    attended = op.Slice(q_latent, zero, zero, zero)
    sequences = op.Squeeze(op.Shape(cached_lengths))
    for b in range(sequences):
        index = op.Unsqueeze(b, zero)
        first = op.Gather(starts, index)
        last = op.Gather(starts, op.Add(index, one))
        past = op.Gather(cached, index)
        new = op.Sub(last, first)
        total = op.Add(past, new)
        used = op.Div(op.Sub(op.Add(total, page_size), one), page_size)
        pages = op.Slice(op.Gather(table, b), zero, used, zero)
        rows = op.Add(op.Mul(op.Unsqueeze(pages, one), page_size), op.Unsqueeze(slots, zero))
        rows = op.Slice(op.Reshape(rows, minus_one), zero, total, zero)
        keys = _DOMAIN.DecodeCells(op.Gather(flat, rows), q_latent)  # [total, rank + rope]
        q = op.Slice(query, first, last, zero)
        shape = op.Shape(q, start=0, end=2)  # [new, H]
        queries = op.Reshape(q, op.Concat(op.ReduceProd(shape, keepdims=1), length, axis=0))  # [new * H, rank + rope]
        scores = op.Transpose(op.MatMul(keys, op.Transpose(queries, perm=[1, 0])), perm=[1, 0])
        scores = op.Mul(scores, op.CastLike(op.Constant(value_float=softmax_scale), scores))
        scores = op.Reshape(scores, op.Concat(shape, total, axis=0), allowzero=1)  # [new, H, total]
        column = op.Range(first_axis, op.Squeeze(total), step)
        own = op.Add(past, op.Range(first_axis, op.Squeeze(new), step))
        future = op.Greater(
            op.Unsqueeze(column, op.Constant(value_ints=[0, 1])), op.Unsqueeze(own, op.Constant(value_ints=[1, 2]))
        )
        scores = op.Where(future, op.CastLike(op.Constant(value_float=-3.0e38), scores), scores)
        weights = op.Softmax(scores, axis=-1)
        weights = op.Reshape(weights, op.Concat(op.ReduceProd(shape, keepdims=1), total, axis=0), allowzero=1)
        values_ = op.Slice(op.MatMul(weights, keys), zero, rank, one)
        values_ = op.Reshape(values_, op.Concat(shape, rank, axis=0), allowzero=1)
        attended = op.Concat(attended, values_, axis=0)
    padding = op.Concat(op.Sub(tokens, count), op.Shape(q_latent, start=1, end=3), axis=0)
    attended = op.Concat(attended, op.Expand(op.CastLike(op.Constant(value_float=0.0), q_latent), padding), axis=0)
    return attended, cache_out
