"""Body of `mla_prefill` for ONNX Runtime: an ONNX function of standard ops over the paged cache and ragged rows.

Appending is that of plugins/mla_attention/ort.py, in place where input and output are bound to one buffer. A Loop takes the
sequences one by one: gather the rows of its pages once, expand keys (transposed, which spares a transposition) and values
for all heads, and attend head by head in batched products. Sequences without new rows are skipped (ORT's MatMul
also divides by the size of an empty operand).
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
    return [MlaPrefill.to_function_proto(), *onnx_codec.functions(call)]


@script(_DOMAIN, default_opset=op)
def MlaPrefill(  # noqa: N802 (the name is the op's, the parameters are its inputs)
    q_nope, q_pe, latent, k_pe, w_uk, w_uv, cache, block_table, cached_lengths, query_starts, num_tokens,
    softmax_scale: float, cache_format: str,
):  # fmt: skip
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    minus_one = op.Constant(value_ints=[-1])
    end = op.Constant(value_ints=[_END])
    first_axis = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    tokens = op.Shape(q_nope, start=0, end=1)
    page_size = op.Shape(cache, start=1, end=2)
    width = op.Shape(cache, start=2, end=3)
    rank = op.Shape(latent, start=1, end=2)
    count = op.Cast(num_tokens, to=_INT64)
    starts = op.Min(op.Cast(query_starts, to=_INT64), count)
    cached = op.Cast(cached_lengths, to=_INT64)
    table = op.Cast(block_table, to=_INT64)

    row = op.Range(first_axis, op.Squeeze(tokens), step)
    valid = op.Less(row, count)
    ends = op.Slice(starts, one, end, zero)
    ended = op.GreaterOrEqual(op.Unsqueeze(row, one), op.Unsqueeze(ends, zero))  # [T, B]: sequence b ends before row t
    owner = op.Where(valid, op.ReduceSum(op.Cast(ended, to=_INT64), one, keepdims=0), zero)  # [T]
    position = op.Where(valid, op.Sub(op.Add(op.Gather(cached, owner), row), op.Gather(starts, owner)), zero)
    entry = op.Concat(op.Unsqueeze(owner, one), op.Unsqueeze(op.Div(position, page_size), one), axis=1)
    page = op.Where(valid, op.GatherND(table, entry), zero)
    slot = op.Concat(op.Unsqueeze(page, one), op.Unsqueeze(op.Mod(position, page_size), one), axis=1)
    cache_out = op.ScatterND(cache, slot, _DOMAIN.EncodeCells(latent, k_pe, cache))

    flat = op.Reshape(cache_out, op.Concat(minus_one, width, axis=0))  # [num_pages * page_size, width]
    slots = op.Range(first_axis, op.Squeeze(page_size), step)
    scale = op.CastLike(op.Constant(value_float=softmax_scale), q_nope)
    shape = op.Concat(op.Shape(q_nope, start=1, end=2), op.Shape(w_uv, start=2, end=3), axis=0)  # H, v_head_dim
    nothing = op.CastLike(op.Constant(value_float=0.0), q_nope)
    attended = op.Expand(nothing, op.Concat(zero, shape, axis=0))
    sequences = op.Squeeze(op.Shape(cached_lengths))
    for b in range(sequences):
        index = op.Unsqueeze(b, zero)
        first = op.Gather(starts, index)
        last = op.Gather(starts, op.Add(index, one))
        past = op.Gather(cached, index)
        if op.Squeeze(op.Less(first, last)):
            new = op.Sub(last, first)
            total = op.Add(past, new)
            used = op.Div(op.Sub(op.Add(total, page_size), one), page_size)
            pages = op.Slice(op.Gather(table, b), zero, used, zero)
            rows = op.Add(op.Mul(op.Unsqueeze(pages, one), page_size), op.Unsqueeze(slots, zero))
            rows = op.Slice(op.Reshape(rows, minus_one), zero, total, zero)
            cells = _DOMAIN.DecodeCells(op.Gather(flat, rows), q_nope)  # [total, rank + rope]
            keys_latent = op.Slice(cells, zero, rank, one)
            keys_pe = op.Transpose(op.Slice(cells, rank, end, one), perm=[1, 0])  # [rope, total]
            keys = op.MatMul(w_uk, op.Transpose(keys_latent, perm=[1, 0]))  # [H, qk_nope_head_dim, total]
            values_ = op.MatMul(keys_latent, w_uv)  # [H, total, v_head_dim]
            q = op.Transpose(op.Slice(q_nope, first, last, zero), perm=[1, 0, 2])  # [H, new, qk_nope_head_dim]
            pe = op.Transpose(op.Slice(q_pe, first, last, zero), perm=[1, 0, 2])
            scores = op.Mul(op.Add(op.MatMul(q, keys), op.MatMul(pe, keys_pe)), scale)  # [H, new, total]
            column = op.Range(first_axis, op.Squeeze(total), step)
            own = op.Add(past, op.Range(first_axis, op.Squeeze(new), step))
            future = op.Greater(op.Unsqueeze(column, zero), op.Unsqueeze(own, one))  # [new, total]
            scores = op.Where(future, op.CastLike(op.Constant(value_float=-3.0e38), scores), scores)
            heads = op.MatMul(op.Softmax(scores, axis=-1), values_)  # [H, new, v_head_dim]
            attended = op.Concat(attended, op.Transpose(heads, perm=[1, 0, 2]), axis=0)
        else:
            attended = op.Identity(attended)
    padding = op.Expand(nothing, op.Concat(op.Sub(tokens, count), shape, axis=0))
    attended = op.Concat(attended, padding, axis=0)
    return attended, cache_out
