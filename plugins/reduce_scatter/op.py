"""Contract of `reduce_scatter`: of the rows of all ranks, which every rank has, the sum over the ranks of its own T.

Sums are of x's type, in an order that NCCL or gloo chooses: rounding may differ from one process's. In bfloat16 they cost
little beside what FP8 costs, and move half the bytes of float32: benchmarks/ranks_numerics.py.
"""

import torch

from latentrt.plugins.contract import ACTIVATIONS, AttributeSpec, OpContract, OutputSpec, TensorSpec, register

CONTRACT = OpContract(
    name="reduce_scatter",
    onnx_type="ReduceScatter",
    inputs=(TensorSpec("x", ("rows", "width"), ACTIVATIONS),),
    outputs=(OutputSpec("y", ("rows / num_ranks", "width"), like="x"),),
    attributes=(AttributeSpec("num_ranks", int),),
    collective=True,
)


def _compute(x, num_ranks):
    from latentrt.plugins.reduce_scatter.reference import reduce_scatter

    return (reduce_scatter(x, num_ranks),)


register(CONTRACT, _compute)
reduce_scatter = torch.ops.latentrt.reduce_scatter
