"""Body of `moe_route` for ONNX Runtime: standard ops, chosen by the attributes when the function is written.

TopK puts the lower index first among equal values (ONNX specification), which is the contract's rule for ties.
"""

from collections.abc import Mapping

import numpy as np
import onnx

from latentrt.plugins.moe_route.op import CONTRACT
from latentrt.plugins.onnx_function import FunctionBuilder, OpCall

_INT32, _INT64 = onnx.TensorProto.INT32, onnx.TensorProto.INT64


def body(call: OpCall) -> list[onnx.FunctionProto]:
    """The function for these attributes; the correction bias is not supported (no V2 checkpoint has one)."""
    assert "correction_bias" not in call.types, call
    f, attributes = FunctionBuilder.of(CONTRACT), call.attributes
    softmax = attributes["scoring_func"] == "softmax"
    scores = f("Softmax", "router_logits", axis=-1) if softmax else f("Sigmoid", "router_logits")
    if attributes["topk_method"] == "group_limited_greedy":
        scores = _limit_to_groups(f, scores, attributes)
    weights, ids = f("TopK", scores, f.constant([attributes["top_k"]]), axis=-1, outputs=2)
    if attributes["norm_topk_prob"]:
        total = f("ReduceSum", weights, f.constant([-1]), keepdims=1)
        weights = f("Div", weights, f("Add", total, f.constant(1e-20, np.float32)))
    weights = f("Mul", weights, f.constant(attributes["routed_scaling_factor"], np.float32))
    tokens = f("Squeeze", f("Shape", "router_logits", start=0, end=1))
    row = f("Range", f.constant(0), tokens, f.constant(1))
    valid = f("Unsqueeze", f("Less", row, f.cast("num_tokens", _INT64)), f.constant([1]))  # [T, 1]
    ids = f("Where", valid, f.cast(ids, _INT32), f.constant(-1, np.int32))
    return [f.finish(ids, f("Where", valid, weights, f.constant(0.0, np.float32)))]


def _limit_to_groups(f: FunctionBuilder, scores: str, attributes: Mapping) -> str:
    """Scores [T, E] with those outside the topk_group best groups set to 0."""
    groups = f("Reshape", scores, f.constant([0, attributes["n_group"], -1]))  # [T, n_group, E / n_group]
    if attributes["group_score"] == "max":
        best = f("ReduceMax", groups, f.constant([-1]), keepdims=0)
    else:
        two, _ = f("TopK", groups, f.constant([2]), axis=-1, outputs=2)
        best = f("ReduceSum", two, f.constant([-1]), keepdims=0)
    _, kept = f("TopK", best, f.constant([attributes["topk_group"]]), axis=-1, outputs=2)
    none = f("Expand", f.constant([[0.0]], np.float32), f("Shape", best))
    chosen = f("Expand", f.constant([[1.0]], np.float32), f("Shape", kept))
    mask = f("ScatterElements", none, kept, chosen, axis=1)  # [T, n_group]
    limited = f("Mul", groups, f("Unsqueeze", mask, f.constant([2])))
    return f("Reshape", limited, f("Shape", scores))
