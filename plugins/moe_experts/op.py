"""Contract of `moe_experts`: sum over a token's chosen experts of weight * down(silu(gate(x)) * up(x)).

gate_up_proj holds, per expert, the rows of gate_proj and then those of up_proj (gate_up_layout "concatenated"), or the
two in turn (gate 0, up 0, gate 1, ...: "interleaved"). The tensors hold experts first_expert .. first_expert + E; an id
outside that range (-1 in padding rows) adds nothing. Only chosen experts are computed.

float8_e4m3fn and uint8 weights come with float32 scales: real weight = weight * scale, or (weight - 128) * scale. A scale
[E, outputs] is one per output channel. A scale [E, outputs, blocks] is one per output channel and block of inputs: block b
holds the inputs b * n .. (b + 1) * n, n = inputs / blocks.

`packed` 2: weights hold two elements of 4 bits in a byte, the even input in the low half: weight = (element - 8) * scale. The
bytes' type is uint8, or int8 with the same bits: TensorRT takes no uint8.
"""

import torch

from latentrt.plugins.contract import (
    ACTIVATIONS,
    FLOAT8,
    FLOAT32,
    INT8,
    INT32,
    UINT8,
    AttributeSpec,
    OpContract,
    OutputSpec,
    TensorSpec,
    register,
)

WEIGHTS = (*ACTIVATIONS, FLOAT8, INT8, UINT8)


def check_blocks(tensors: dict, attributes: dict) -> str | None:
    """What the contract's dimensions cannot say: blocks of inputs that share a scale are equal."""
    for name in ("gate_up", "down"):
        scale, inputs = tensors[f"{name}_scale"], tensors[f"{name}_proj"].shape[-1] * attributes["packed"]
        if scale is not None and scale.dim() == 3 and (scale.shape[2] == 0 or inputs % scale.shape[2]):
            found = f"{name}_scale has shape {tuple(scale.shape)}, blocks of inputs on axis 2"
            return f"{found}; {name}_proj has {inputs} inputs, which must be a multiple of the number of blocks"
    packed, dtypes = attributes["packed"], {tensors[f"{name}_proj"].dtype for name in ("gate_up", "down")}
    if (packed > 1 and not dtypes <= {INT8, UINT8}) or (packed == 1 and INT8 in dtypes):
        accepted = "1 or 2 for uint8 weights, 2 for int8 ones, 1 for all others"
        return f"packed is {packed}, found weights of {', '.join(sorted(map(str, dtypes)))}; accepted: {accepted}"
    return None


CONTRACT = OpContract(
    name="moe_experts",
    onnx_type="MoeExperts",
    inputs=(
        TensorSpec("x", ("T", "hidden_size"), ACTIVATIONS),
        TensorSpec("topk_ids", ("T", "top_k"), (INT32,)),
        TensorSpec("topk_weights", ("T", "top_k"), (FLOAT32,)),
        TensorSpec("gate_up_proj", ("E", "2 * moe_intermediate_size", "hidden_size"), WEIGHTS, packed="packed"),
        TensorSpec("down_proj", ("E", "hidden_size", "moe_intermediate_size"), WEIGHTS, packed="packed"),
        TensorSpec("gate_up_scale", ("E", "2 * moe_intermediate_size", "gate_up_blocks?"), (FLOAT32,), optional=True),
        TensorSpec("down_scale", ("E", "hidden_size", "down_blocks?"), (FLOAT32,), optional=True),
    ),
    outputs=(OutputSpec("y", ("T", "hidden_size"), like="x"),),
    attributes=(
        AttributeSpec("first_expert", int),
        AttributeSpec("gate_up_layout", str, choices=("concatenated", "interleaved")),
        AttributeSpec("packed", int, choices=(1, 2), default=1),  # elements of a weight to one of the tensor's
        AttributeSpec("total_experts", int, default=0),  # of all ranks, which rows are spread over; 0: the tensors have all
    ),
    check=check_blocks,
)


def _compute(*tensors, **attributes):
    from latentrt.plugins.moe_experts.reference import moe_experts

    return (moe_experts(*tensors, **attributes),)


register(CONTRACT, _compute)
moe_experts = torch.ops.latentrt.moe_experts
