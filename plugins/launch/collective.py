"""TensorRT plugins of collective ops: one call of NCCL on the step's stream, and no kernel of ours."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from latentrt.plugins.architecture import Gpu
from latentrt.plugins.contract import OpContract
from latentrt.plugins.launch.nccl import Collective
from latentrt.plugins.launch.plan import Plan
from latentrt.plugins.trt_base import PluginOp


@dataclass(frozen=True)
class Config:
    """The static part of a call."""

    function: str
    num_ranks: int
    dtype: str  # torch's word


def plugin(contract: OpContract) -> PluginOp:
    """The plugin of a collective op, whose contract has one input, x, and one output, y, each with two axes."""
    dims = contract.inputs[0].dims

    def configure(attributes: Mapping, sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> Config:
        return Config(contract.name, attributes["num_ranks"], dtypes["x"])

    def plan(config: Config, sizes: Mapping[str, int], target: Gpu) -> Plan:
        given = prod(sizes[dim] for dim in dims)
        count = given if config.function == "all_gather" else given // config.num_ranks
        return Plan((Collective(config.function, "x", "y", count, config.dtype),))

    return PluginOp(contract, configure, plan, lambda config, target: (), lambda config, sizes, target: 0)
