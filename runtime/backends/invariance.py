"""Batch invariance on the CPU: the bits of a token's row depend on the sequence's own tokens and on nothing else of a step.

Own kernels compute every row as if it were alone, but for one choice: chunks of prompts may attend in the expanded form. So
all rows attend absorbed. Of the nodes that ONNX Runtime runs beside them, products of floats choose another kernel for another
number of rows, and cosines another one for the last few numbers of a tensor: these go into a Scan, which runs them row by row.
Whatever else a graph holds runs in steps of one row: then nothing can depend on other rows, and nothing is shared either.
"""

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from latentrt.plugins.step_graph import ABSORBED

_OWN = "latentrt.cpu"  # the domain of own kernels
_FORM = "form"
_MLA = ("Mla", "MlaHalf", "MlaPacked")
_ALONE = ("Linear", "LinearPair", "GatedMlp", "MoeRoute", "Experts", *_MLA)
_ROW_BY_ROW = ("Gemm", "MatMul", "Cos", "Sin")
# Each number, or each row's sum, by itself: the same operations whatever stands beside it.
_ROWWISE = (
    "Add", "Sub", "Mul", "Cast", "Gather", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Constant", "RMSNormalization",
    "SkipSimplifiedLayerNormalization",
)  # fmt: skip


def whole_steps(file: Path) -> bytes | None:
    """The graph with own kernels in `file`, changed so that whole steps are invariant; None where it holds what is not known
    to be. Weights stay where they are."""
    model = onnx.load(str(file), load_external_data=False)
    known = (*_ALONE, *_ROW_BY_ROW, *_ROWWISE)
    fixed = {t.name: len(t.dims) for t in model.graph.initializer}
    if model.functions or not all(n.op_type in known and _rows_first(n, fixed) for n in model.graph.node):
        return None
    nodes = [_changed(node) for node in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model.SerializeToString()


def _rows_first(node: onnx.NodeProto, fixed: dict[str, int]) -> bool:
    """Whether a product is one of rows with a matrix of weights, as the Scan takes it apart. `fixed`: axes of weights."""
    if node.op_type not in ("Gemm", "MatMul"):
        return True
    turned = any(a.name == "transA" and a.i for a in node.attribute)
    is_matrix = fixed.get(node.input[1]) == 2
    return is_matrix and not turned and node.input[0] not in fixed and all(name in fixed for name in node.input[1:])


def _changed(node: onnx.NodeProto) -> onnx.NodeProto:
    if node.domain == _OWN and node.op_type in _MLA:
        kept = [a for a in node.attribute if a.name != _FORM]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(_FORM, ABSORBED)])
    return _scanned(node) if node.op_type in _ROW_BY_ROW else node


def _scanned(node: onnx.NodeProto) -> onnx.NodeProto:
    """The node for one row [1, ...] after the other; a weight comes in from outside of the Scan."""
    row, made, one = (f"{node.output[0]}.{word}" for word in ("row", "made", "one"))
    inner = onnx.NodeProto()
    inner.CopyFrom(node)
    inner.input[0], inner.output[0] = f"{row}.wide", f"{made}.wide"
    axis = helper.make_tensor(one, TensorProto.INT64, [1], [0])
    body = helper.make_graph(
        [helper.make_node("Unsqueeze", [row, one], [inner.input[0]]), inner,
         helper.make_node("Squeeze", [inner.output[0], one], [made])],
        f"{node.name}.row", [helper.make_tensor_value_info(row, TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info(made, TensorProto.FLOAT, None)], [axis],
    )  # fmt: skip
    return helper.make_node("Scan", node.input[:1], node.output[:1], name=node.name, body=body, num_scan_inputs=1)
