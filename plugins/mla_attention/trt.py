"""TensorRT plugin of `mla_attention`: the cache is updated in place, its output aliases its input."""

from collections.abc import Mapping

from latentrt.plugins.architecture import Gpu
from latentrt.plugins.mla_attention.op import CONTRACT
from latentrt.plugins.mla_attention.plan import Attention, kernels, plan, workspace_bytes
from latentrt.plugins.trt_base import PluginOp


def _configure(attributes: Mapping, sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> Attention:
    return Attention(
        sizes["H"], sizes["kv_lora_rank"], sizes["qk_rope_head_dim"], sizes["page_size"], dtypes["q_latent"],
        attributes["cache_format"], attributes["softmax_scale"],
    )  # fmt: skip


def _plan(config: Attention, sizes: Mapping[str, int], target: Gpu):
    return plan(config, sizes["T"], sizes["B"], sizes["max_pages"], target)


OP = PluginOp(CONTRACT, _configure, _plan, kernels, lambda config, sizes, target: workspace_bytes(config, target))
