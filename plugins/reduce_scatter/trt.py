"""TensorRT plugin of `reduce_scatter`, for networks that have not TensorRT's own collectives."""

from latentrt.plugins.launch.collective import plugin
from latentrt.plugins.reduce_scatter.op import CONTRACT

OP = plugin(CONTRACT)
