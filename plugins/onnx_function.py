"""Writing the body of an op as an ONNX function, from Python where the op's attributes decide which nodes are needed."""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from plugins.contract import DOMAIN, OpContract

MICROSOFT = "com.microsoft"
OPSET = 23


class FunctionBuilder:
    """Collects nodes over value names. Input names are the contract's; "" stands for an input left out."""

    def __init__(self, contract: OpContract):
        self.contract, self.nodes = contract, []

    def __call__(self, op_type: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes):
        """Appends a node; returns its output's name, or a list of names where there are several."""
        names = [f"{op_type}.{len(self.nodes)}.{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(op_type, inputs, names, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, value, dtype=np.int64) -> str:
        return self("Constant", value=numpy_helper.from_array(np.asarray(value, dtype)))

    def cast(self, value: str, to: int) -> str:
        return self("Cast", value, to=to)

    def finish(self, *outputs: str) -> onnx.FunctionProto:
        """The function, named as the contract names the op; `outputs` are the values that it returns, in order."""
        names = [o.name for o in self.contract.outputs]
        self.nodes += [helper.make_node("Identity", [v], [n]) for v, n in zip(outputs, names, strict=True)]
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        inputs, attributes = [s.name for s in self.contract.inputs], [a.name for a in self.contract.attributes]
        return helper.make_function(DOMAIN, self.contract.onnx_type, inputs, names, self.nodes, opsets, attributes)
