"""Contract of `all_gather`: the rows of all ranks one after another, rank 0's first. Every rank gives equally many."""

import torch

from latentrt.plugins.contract import ACTIVATIONS, INT32, AttributeSpec, OpContract, OutputSpec, TensorSpec, register

CONTRACT = OpContract(
    name="all_gather",
    onnx_type="AllGather",
    inputs=(TensorSpec("x", ("T", "width"), (*ACTIVATIONS, INT32)),),
    outputs=(OutputSpec("y", ("num_ranks * T", "width"), like="x"),),
    attributes=(AttributeSpec("num_ranks", int),),
    collective=True,
)


def _compute(x, num_ranks):
    from latentrt.plugins.all_gather.reference import all_gather

    return (all_gather(x, num_ranks),)


register(CONTRACT, _compute)
all_gather = torch.ops.latentrt.all_gather
