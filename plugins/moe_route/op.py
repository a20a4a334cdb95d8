"""Contract of `moe_route`: which experts each token goes to, and with what weight (arXiv 2405.04434, 2.2).

scores = softmax or sigmoid of the router logits, in float32. The choice is made on scores + correction_bias (if given);
the weights are the scores alone. topk_method:
  greedy                the top_k best experts of all;
  group_limited_greedy  experts outside the topk_group best groups count as 0, then the top_k best.
A group's score is its best member (max) or the sum of its two best (top2_sum). Ties go to the lowest index. Weights are
divided by their sum (plus 1e-20) if norm_topk_prob is 1, then multiplied by routed_scaling_factor.
Rows at or beyond num_tokens are padding: ids -1, weights 0.
"""

import torch

from latentrt.plugins.contract import FLOAT32, INT32, AttributeSpec, OpContract, OutputSpec, TensorSpec, register

CONTRACT = OpContract(
    name="moe_route",
    onnx_type="MoeRoute",
    inputs=(
        TensorSpec("router_logits", ("T", "E"), (FLOAT32,)),
        TensorSpec("num_tokens", ("1",), (INT32,)),
        TensorSpec("correction_bias", ("E",), (FLOAT32,), optional=True),
    ),
    outputs=(
        OutputSpec("topk_ids", ("T", "top_k"), dtype=INT32),
        OutputSpec("topk_weights", ("T", "top_k"), dtype=FLOAT32),
    ),
    attributes=(
        AttributeSpec("scoring_func", str, choices=("softmax", "sigmoid")),
        AttributeSpec("topk_method", str, choices=("greedy", "group_limited_greedy")),
        AttributeSpec("group_score", str, choices=("max", "top2_sum")),
        AttributeSpec("n_group", int),
        AttributeSpec("topk_group", int),
        AttributeSpec("top_k", int),
        AttributeSpec("norm_topk_prob", int, choices=(0, 1)),
        AttributeSpec("routed_scaling_factor", float),
    ),
)


def _compute(*tensors, **attributes):
    from latentrt.plugins.moe_route.reference import moe_route

    return moe_route(*tensors, **attributes)


register(CONTRACT, _compute)
moe_route = torch.ops.latentrt.moe_route
