"""TensorRT plugin of `moe_experts`."""

from collections.abc import Mapping

from plugins.architecture import Target
from plugins.moe_experts.op import CONTRACT
from plugins.moe_experts.plan import Experts, kernels, plan
from plugins.moe_experts.tiles import FEW, SOME
from plugins.trt_base import PluginOp


def _configure(attributes: Mapping, sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> Experts:
    return Experts(
        sizes["E"], sizes["hidden_size"], sizes["moe_intermediate_size"], sizes["top_k"], dtypes["x"],
        dtypes["gate_up_proj"], attributes["first_expert"], attributes["gate_up_layout"],
    )  # fmt: skip


def _plan(config: Experts, sizes: Mapping[str, int], target: Target):
    return plan(config, sizes["T"], target)


def _workspace(config: Experts, sizes: Mapping[str, int], target: Target) -> int:
    """Bytes. The workspace grows with T as long as the tiles' size class stays, so each class's last T is looked at."""
    last = [rows * config.num_experts // config.top_k for rows in (FEW, SOME)]
    tokens = {min(max(t, 1), sizes["T"]) for t in (*last, sizes["T"])}
    return max(plan(config, t, target).workspace_bytes for t in tokens)


OP = PluginOp(CONTRACT, _configure, _plan, kernels, _workspace)
