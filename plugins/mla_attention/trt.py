"""TensorRT plugin of `mla_attention`: the cache is updated in place, its output aliases its input."""

from collections.abc import Mapping

from plugins.architecture import Target
from plugins.launch import place
from plugins.mla_attention.op import CONTRACT
from plugins.mla_attention.plan import WAVES, Attention, kernels, plan
from plugins.mla_attention.tiles import TILES
from plugins.trt_base import PluginOp


def _configure(attributes: Mapping, sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> Attention:
    return Attention(
        sizes["H"], sizes["kv_lora_rank"], sizes["qk_rope_head_dim"], sizes["page_size"], dtypes["q_latent"],
        attributes["cache_format"], attributes["softmax_scale"],
    )  # fmt: skip


def _plan(config: Attention, sizes: Mapping[str, int], target: Target):
    return plan(config, sizes["T"], sizes["B"], sizes["max_pages"], target)


def _workspace(config: Attention, sizes: Mapping[str, int], target: Target) -> int:
    """Bytes. A plan splits only where programs * splits <= WAVES * num_sms, and a program covers at most block_m pairs."""
    pairs = WAVES * target.num_sms * max(tile.block_m for tile in TILES[target.capability].values())
    last = place(("partial", "fp32", (pairs, config.kv_lora_rank)), ("lse", "fp32", (pairs,)))[-1]
    return last.offset + last.size


OP = PluginOp(CONTRACT, _configure, _plan, kernels, _workspace)
