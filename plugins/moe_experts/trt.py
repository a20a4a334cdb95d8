"""TensorRT plugin of `moe_experts`."""

from collections.abc import Mapping

from latentrt.plugins.architecture import Gpu
from latentrt.plugins.moe_experts.op import CONTRACT
from latentrt.plugins.moe_experts.plan import Experts, kernels, plan, workspace_bytes
from latentrt.plugins.trt_base import PluginOp


def _configure(attributes: Mapping, sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> Experts:
    return Experts(
        sizes["E"], sizes["hidden_size"], sizes["moe_intermediate_size"], sizes["top_k"], dtypes["x"],
        dtypes["gate_up_proj"], attributes["first_expert"], attributes["gate_up_layout"], sizes.get("gate_up_blocks", 1),
        sizes.get("down_blocks", 1), attributes.get("total_experts", 0), attributes.get("packed", 1),
    )  # fmt: skip


def _plan(config: Experts, sizes: Mapping[str, int], target: Gpu):
    return plan(config, sizes["T"], target)


def _workspace(config: Experts, sizes: Mapping[str, int], target: Gpu) -> int:
    return workspace_bytes(config, sizes["T"], target)


OP = PluginOp(CONTRACT, _configure, _plan, kernels, _workspace)
