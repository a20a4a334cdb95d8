"""Contract of `mla_attention`: absorbed multi-head latent attention over a paged latent cache (arXiv 2405.04434, 2.1).

The T rows are B sequences one after another: rows query_starts[b] .. query_starts[b + 1] are the new tokens of
sequence b, whose first cached_lengths[b] tokens are in the cache already. Row i of a sequence has position
cached_lengths[b] + i; it is appended at page block_table[b, position // page_size], slot position % page_size, and
attends to positions 0 .. its own. Rows at or beyond num_tokens are padding: nothing is appended for them outside page 0,
the scratch page, and their output is zero. Pages are only written at and beyond cached_lengths, so shared prefix pages
stay as they are.
"""

import torch

from latentrt.plugins import cache_formats
from latentrt.plugins.contract import ACTIVATIONS, INT32, AttributeSpec, OpContract, OutputSpec, TensorSpec, register

CACHES = tuple(getattr(torch, element) for element in cache_formats.ELEMENTS)


def check_cache(tensors: dict, attributes: dict) -> str | None:
    """What the contract's dimensions cannot say: the cache fits its format."""
    layout, cache = cache_formats.get(attributes["cache_format"]), tensors["cache"]
    width = layout.width(tensors["latent"].shape[-1], tensors["k_pe"].shape[-1])
    if (cache.dtype, cache.shape[-1]) == (layout.dtype, width):
        return None
    found = f"cache has dtype {cache.dtype} and shape {tuple(cache.shape)}"
    return f"{found}; cache_format {layout.name} takes {layout.dtype} and a last dimension of {width}"


CONTRACT = OpContract(
    name="mla_attention",
    onnx_type="MlaAttention",
    inputs=(
        TensorSpec("q_latent", ("T", "H", "kv_lora_rank"), ACTIVATIONS),
        TensorSpec("q_pe", ("T", "H", "qk_rope_head_dim"), ACTIVATIONS),
        TensorSpec("latent", ("T", "kv_lora_rank"), ACTIVATIONS),
        TensorSpec("k_pe", ("T", "qk_rope_head_dim"), ACTIVATIONS),
        TensorSpec("cache", ("num_pages", "page_size", "cache_width"), CACHES),
        TensorSpec("block_table", ("B", "max_pages"), (INT32,)),
        TensorSpec("cached_lengths", ("B",), (INT32,)),
        TensorSpec("query_starts", ("B + 1",), (INT32,)),
        TensorSpec("num_tokens", ("1",), (INT32,)),
    ),
    outputs=(
        OutputSpec("attended", ("T", "H", "kv_lora_rank"), like="q_latent"),
        OutputSpec("cache_out", ("num_pages", "page_size", "cache_width"), like="cache"),
    ),
    attributes=(
        AttributeSpec("softmax_scale", float),
        AttributeSpec("cache_format", str, choices=cache_formats.NAMES),
    ),
    aliases=(("cache_out", "cache"),),
    check=check_cache,
)


def _compute(*tensors, **attributes):
    from latentrt.plugins.mla_attention.reference import mla_attention

    return mla_attention(*tensors, **attributes)


register(CONTRACT, _compute)
mla_attention = torch.ops.latentrt.mla_attention
mla_attention_ = torch.ops.latentrt.mla_attention_
