"""Makes the very ONNX file that an engine is built from run on ONNX Runtime's CPU provider, to prove its numbers.

The custom ops get function bodies. ONNX Runtime has no bfloat16 kernels on the CPU but for moving data and Cast (1.31: no
MatMul, Gemm, Add, Mul, Sigmoid, RMSNormalization), and rejects bfloat16 scales of DequantizeLinear. So every such node is
put between casts: its bfloat16 inputs to float32, its float32 outputs back to bfloat16. Nodes, attributes, weights and the
rounding of every value between nodes stay what they are; a product sums in float32, as tensor cores do.
"""

import onnx
import torch
from onnx import TensorProto, helper

from latentrt.plugins.contract import DOMAIN
from latentrt.plugins.onnx_function import bodies
from latentrt.runtime.backends.torch.ops import DTYPES

_MOVES = {"Cast", "Concat", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
_BF16, _FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT


def runnable(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` with function bodies and casts. Every value of it must have a type (value_info)."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    functions = bodies(result)
    graph = result.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    types |= {t.name: t.data_type for t in graph.initializer}
    casts = _Casts(types)
    nodes = [copy for node in graph.node for copy in casts.around(node)]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    result.functions.extend(functions)
    return result


def standalone(model: onnx.ModelProto) -> onnx.ModelProto:
    """`runnable` where custom ops have no bodies yet; bfloat16 inputs and outputs, which numpy lacks, become float32."""
    result = model if any(f.domain == DOMAIN for f in model.functions) else runnable(model)
    graph, types = result.graph, {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.input)}
    given = [v for v in graph.input if types.get(v.name) == _BF16]
    made = [v for v in graph.output if types.get(v.name) == _BF16]
    narrow = {v.name: f"{v.name}.bfloat16" for v in (*given, *made)}
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [narrow.get(n, n) for n in names]
    before = [helper.make_node("Cast", [v.name], [narrow[v.name]], to=_BF16) for v in given]
    after = [helper.make_node("Cast", [narrow[v.name]], [v.name], to=_FLOAT) for v in made]
    for value in (*given, *made):
        value.type.tensor_type.elem_type = _FLOAT
    nodes = [*before, *graph.node, *after]
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    return result


def initializer(name: str, tensor: torch.Tensor) -> TensorProto:
    """A tensor of any type that torch has, as it lies in memory."""
    kind = next(k for k, dtype in DTYPES.items() if dtype == tensor.dtype)
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return TensorProto(name=name, data_type=kind, dims=tensor.shape, raw_data=raw)


class _Casts:
    def __init__(self, types: dict[str, int]):
        self.types, self.wide = types, {}

    def around(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The node, between the casts that it needs; a value is cast to float32 once."""
        names = [n for n in (*node.input, *node.output) if n]
        if node.op_type in _MOVES or all(self.types[n] != _BF16 for n in names):
            return [node]
        before, after, copy = [], [], onnx.NodeProto()
        copy.CopyFrom(node)
        for i, name in enumerate(node.input):
            if name and self.types[name] == _BF16:
                if name not in self.wide:
                    self.wide[name] = f"{name}.float32"
                    before.append(helper.make_node("Cast", [name], [self.wide[name]], to=_FLOAT))
                copy.input[i] = self.wide[name]
        for i, name in enumerate(node.output):
            if name and self.types[name] == _BF16:
                copy.output[i] = f"{name}.unrounded"
                after.append(helper.make_node("Cast", [copy.output[i]], [name], to=_BF16))
        return [*before, copy, *after]
