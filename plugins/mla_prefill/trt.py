"""TensorRT plugin of `mla_prefill`: the cache is updated in place, its output aliases its input."""

from collections.abc import Mapping

from latentrt.plugins.architecture import Gpu
from latentrt.plugins.mla_prefill.op import CONTRACT
from latentrt.plugins.mla_prefill.plan import Prefill, kernels, plan, workspace_bytes
from latentrt.plugins.trt_base import PluginOp


def _configure(attributes: Mapping, sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> Prefill:
    return Prefill(
        sizes["H"], sizes["kv_lora_rank"], sizes["qk_nope_head_dim"], sizes["qk_rope_head_dim"], sizes["v_head_dim"],
        sizes["page_size"], dtypes["q_nope"], attributes["cache_format"], attributes["softmax_scale"],
    )  # fmt: skip


def _plan(config: Prefill, sizes: Mapping[str, int], target: Gpu):
    return plan(config, sizes["T"], sizes["B"], sizes["max_pages"], target)


def _workspace(config: Prefill, sizes: Mapping[str, int], target: Gpu) -> int:
    return workspace_bytes(config, sizes["T"], sizes["B"], sizes["max_pages"], target)


OP = PluginOp(CONTRACT, _configure, _plan, kernels, _workspace)
