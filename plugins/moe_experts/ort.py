"""Body of `moe_experts` for ONNX Runtime, by gate_up_layout.

"interleaved": its own MoE kernel (float32 weights) or QMoE (uint8), which compute chosen experts only. They know no other
layout on the CPU. Both choose experts themselves, so ids and weights are scattered to a dense [T, E] row first.
MoE takes the top k of a softmax: it is given log(weight) for chosen experts, whose softmax is weight / sum, and its result
is multiplied by the sum. QMoE takes selection and weights apart (input 14, router_weights).
Known defect (onnxruntime 1.31): if input and output of the node are both intermediate values and nothing later reads the
input, the result is garbage; so a zero made of both is added.

"concatenated": plain float32 products that compute every expert for every token, slow and exact. It stands in for the GPU
kernels where a graph made for them is proven on the CPU. With e4m3 weights, rows of x and of the inner activations are
quantized to e4m3 with one scale a row, as those kernels do. int8 weights hold two elements of 4 bits each.
"""

from functools import partial

import numpy as np
import onnx

from latentrt.plugins.moe_experts.op import CONTRACT
from latentrt.plugins.onnx_function import MICROSOFT, FunctionBuilder, OpCall

_FLOAT, _INT64, _FLOAT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.FLOAT8E4M3FN
_UINT8, _INT8, _INT32 = onnx.TensorProto.UINT8, onnx.TensorProto.INT8, onnx.TensorProto.INT32
_SWIGLU = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}


def body(call: OpCall) -> list[onnx.FunctionProto]:
    """The function for one layout, type and number of experts, block size of scales, and number of choices."""
    f = FunctionBuilder.of(CONTRACT)
    ids = f("Sub", f.cast("topk_ids", _INT64), f.constant(call.attributes["first_expert"]))  # [T, top_k]
    chosen_only = call.attributes["gate_up_layout"] == "interleaved"
    return [f.finish(_chosen_experts(f, call, ids) if chosen_only else _every_expert(f, call, ids))]


def _chosen_experts(f: FunctionBuilder, call: OpCall, ids: str) -> str:
    experts, weight_type = call.shapes["gate_up_proj"][0], call.types["gate_up_proj"]
    local = f("And", f("GreaterOrEqual", ids, f.constant(0)), f("Less", ids, f.constant(experts)))  # [T, top_k]
    column = f("Where", local, ids, f.constant(experts))  # one more column takes what is not local
    weights = f("Where", local, "topk_weights", f.constant(0.0, np.float32))
    kernel = {"k": min(call.shapes["topk_ids"][1], experts), "normalize_routing_weights": 0, **_SWIGLU}
    assert weight_type in (_FLOAT, _UINT8), call
    if weight_type == _FLOAT:
        return _keep_alive(f, _moe(f, column, weights, experts, kernel))
    quantized = {"expert_weight_bits": 8 // call.attributes["packed"]} | _block_size(call)
    return _keep_alive(f, _qmoe(f, column, weights, experts, kernel | quantized))


def _block_size(call: OpCall) -> dict[str, int]:
    """QMoE's attribute for scales per block of inputs, the same for both weights; none for scales per output channel."""
    pairs = [(call.shapes[f"{name}_proj"], call.shapes[f"{name}_scale"]) for name in ("gate_up", "down")]
    packed = call.attributes["packed"]
    sizes = {weight[2] * packed // scale[2] if len(scale) == 3 else 0 for weight, scale in pairs}
    assert len(sizes) == 1, call
    return {"block_size": size} if (size := sizes.pop()) else {}


def _every_expert(f: FunctionBuilder, call: OpCall, ids: str) -> str:
    experts, float8 = call.shapes["gate_up_proj"][0], call.types["gate_up_proj"] == _FLOAT8
    packed = call.types["gate_up_proj"] == _INT8
    assert call.types["gate_up_proj"] != _UINT8 and (packed or len(call.shapes.get("gate_up_scale", (1, 1))) == 2), call
    transposed = _unpacked if packed else partial(_transposed, float8=float8)
    rows = _round_rows(f, "x") if float8 else "x"
    gate_up = f("MatMul", f("Unsqueeze", rows, f.constant([0])), transposed(f, "gate_up_proj", "gate_up_scale"))
    gate, up = f("Split", gate_up, axis=-1, num_outputs=2, outputs=2)  # [E, T, moe_intermediate_size]
    inner = f("Mul", f("Mul", gate, f("Sigmoid", gate)), up)
    outer = f("MatMul", _round_rows(f, inner) if float8 else inner, transposed(f, "down_proj", "down_scale"))
    expert = f.constant(np.arange(experts).reshape(experts, 1, 1))
    chosen = f("Equal", f("Unsqueeze", ids, f.constant([0])), expert)  # [E, T, top_k]
    weights = f("Where", chosen, f("Unsqueeze", "topk_weights", f.constant([0])), f.constant(0.0, np.float32))
    weights = f("ReduceSum", weights, f.constant([2]), keepdims=1)  # [E, T, 1]
    return f("ReduceSum", f("Mul", outer, weights), f.constant([0]), keepdims=0)


def _transposed(f: FunctionBuilder, weight: str, scale: str, float8: bool) -> str:
    """[E, out, in] -> [E, in, out] float32."""
    values = f.cast(weight, _FLOAT)
    if float8:
        values = f("Mul", values, f("Unsqueeze", scale, f.constant([2])))
    return f("Transpose", values, perm=[0, 2, 1])


def _unpacked(f: FunctionBuilder, weight: str, scale: str) -> str:
    """Bytes [E, out, in / 2] with scales [E, out, blocks] -> [E, in, out] float32."""
    octets, low_bits = f.cast(weight, _INT32), f.constant(15, np.int32)
    low = f("BitwiseAnd", octets, low_bits)
    high = f("BitwiseAnd", f("Div", f("Sub", octets, low), f.constant(16, np.int32)), low_bits)
    pairs = f("Concat", f("Unsqueeze", low, f.constant([3])), f("Unsqueeze", high, f.constant([3])), axis=3)
    values = f("Sub", f.cast(pairs, _FLOAT), f.constant(8.0, np.float32))
    blocks = f("Reshape", values, f("Concat", f("Shape", scale), f.constant([-1]), axis=0))  # [E, out, blocks, inputs]
    scaled = f("Mul", blocks, f("Unsqueeze", scale, f.constant([3])))
    return f("Transpose", f("Reshape", scaled, f.constant([0, 0, -1])), perm=[0, 2, 1])


def _round_rows(f: FunctionBuilder, x: str) -> str:
    """Rows of x as e4m3 with scale max(|x|) / 448, and back to float32."""
    largest = f("ReduceMax", f("Abs", x), f.constant([-1]), keepdims=1)
    scale = f("Div", f("Max", largest, f.constant(1e-10, np.float32)), f.constant(448.0, np.float32))
    return f("Mul", f.cast(f.cast(f("Div", x, scale), _FLOAT8), _FLOAT), scale)


def _moe(f: FunctionBuilder, column: str, weights: str, experts: int, kernel: dict) -> str:
    positive = f("Max", weights, f.constant(1e-37, np.float32))
    logits = _scatter(f, column, f("Log", positive), experts, -1e30)
    y = f("MoE", "x", logits, "gate_up_proj", "", "down_proj", domain=MICROSOFT, **kernel)
    return f("Mul", y, f("ReduceSum", weights, f.constant([1]), keepdims=1))


def _qmoe(f: FunctionBuilder, column: str, weights: str, experts: int, kernel: dict) -> str:
    chosen = _scatter(f, column, f("Add", weights, f.constant(1.0, np.float32)), experts, 0.0)
    dense = _scatter(f, column, weights, experts, 0.0)
    inputs = ["x", chosen, "gate_up_proj", "gate_up_scale", "", "down_proj", "down_scale", *[""] * 7, dense]
    return f("QMoE", *inputs, domain=MICROSOFT, **kernel)


def _scatter(f: FunctionBuilder, column: str, values: str, experts: int, fill: float) -> str:
    """[T, top_k] values at their columns of a [T, experts] row that is `fill` elsewhere."""
    rows = f("Shape", values, start=0, end=1)
    shape = f("Concat", rows, f.constant([experts + 1]), axis=0)
    dense = f("ScatterElements", f("Expand", f.constant([[fill]], np.float32), shape), column, values, axis=1)
    return f("Slice", dense, f.constant([0]), f.constant([experts]), f.constant([1]))


def _keep_alive(f: FunctionBuilder, y: str) -> str:
    start, end, axis, zero = f.constant([0]), f.constant([1]), f.constant([1]), f.constant(0.0, np.float32)
    column_of_x, column_of_y = f("Slice", "x", start, end, axis), f("Slice", y, start, end, axis)
    return f("Add", y, f("Mul", f("Mul", column_of_y, zero), column_of_x))
