"""Makes the very ONNX file that an engine is built from run on ONNX Runtime's CPU provider, to prove its numbers.

The custom ops get function bodies. ONNX Runtime has no bfloat16 kernels on the CPU but for moving data and Cast (1.31: no
MatMul, Gemm, Add, Mul, Sigmoid, RMSNormalization), and rejects bfloat16 scales of DequantizeLinear. So every such node is
put between casts: its bfloat16 inputs to float32, its float32 outputs back to bfloat16. Nodes, attributes, weights and the
rounding of every value between nodes stay what they are; a product sums in float32, as tensor cores do.
"""

import onnx
from onnx import TensorProto, helper

from latentrt.plugins.onnx_function import bodies

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
