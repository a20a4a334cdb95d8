"""TensorRT plugin of `moe_experts`."""

from collections.abc import Mapping

from plugins.architecture import Target
from plugins.moe_experts.op import CONTRACT
from plugins.moe_experts.plan import Experts, kernels, plan, workspace_bytes
from plugins.trt_base import PluginOp


def _configure(attributes: Mapping, sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> Experts:
    return Experts(
        sizes["E"], sizes["hidden_size"], sizes["moe_intermediate_size"], sizes["top_k"], dtypes["x"],
        dtypes["gate_up_proj"], attributes["first_expert"], attributes["gate_up_layout"],
    )  # fmt: skip


def _plan(config: Experts, sizes: Mapping[str, int], target: Target):
    return plan(config, sizes["T"], target)


def _workspace(config: Experts, sizes: Mapping[str, int], target: Target) -> int:
    return workspace_bytes(config, sizes["T"], target)


OP = PluginOp(CONTRACT, _configure, _plan, kernels, _workspace)
