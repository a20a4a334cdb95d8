"""TensorRT plugin of `moe_route`."""

from collections.abc import Mapping

from latentrt.plugins.architecture import Gpu
from latentrt.plugins.moe_route.op import CONTRACT
from latentrt.plugins.moe_route.plan import Routing, kernels, plan
from latentrt.plugins.trt_base import PluginOp


def _configure(attributes: Mapping, sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> Routing:
    return Routing(num_experts=sizes["E"], has_bias="correction_bias" in dtypes, **attributes)


def _plan(config: Routing, sizes: Mapping[str, int], target: Gpu):
    return plan(config, sizes["T"], target)


OP = PluginOp(CONTRACT, _configure, _plan, kernels, lambda config, sizes, target: 0)
