"""TensorRT plugin of `all_gather`, for networks that have not TensorRT's own collectives."""

from latentrt.plugins.all_gather.op import CONTRACT
from latentrt.plugins.launch.collective import plugin

OP = plugin(CONTRACT)
