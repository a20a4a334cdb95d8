"""Contract of `mla_prefill`: the expanded form of `mla_attention`, for prompt chunks (arXiv 2405.04434, 2.1).

Rows, pages, lengths and padding are those of `mla_attention` (plugins/mla_attention/op.py), and so are the cache and what
is appended to it. Keys and values are expanded from the latent inside the op: head h of a cached token has the key
[w_uk[h] @ latent, k_pe] and the value latent @ w_uv[h]. So a pair of query and cached token takes qk_nope_head_dim +
qk_rope_head_dim + v_head_dim products and not 2 kv_lora_rank + qk_rope_head_dim (320 and not 1088 for DeepSeek-V2), and
every cached token takes kv_lora_rank (qk_nope_head_dim + v_head_dim) more, once for all rows of its sequence.
"""

import torch

from latentrt.plugins import cache_formats
from latentrt.plugins.contract import ACTIVATIONS, INT32, AttributeSpec, OpContract, OutputSpec, TensorSpec, register
from latentrt.plugins.mla_attention.op import CACHES, check_cache

CONTRACT = OpContract(
    name="mla_prefill",
    onnx_type="MlaPrefill",
    inputs=(
        TensorSpec("q_nope", ("T", "H", "qk_nope_head_dim"), ACTIVATIONS),
        TensorSpec("q_pe", ("T", "H", "qk_rope_head_dim"), ACTIVATIONS),
        TensorSpec("latent", ("T", "kv_lora_rank"), ACTIVATIONS),
        TensorSpec("k_pe", ("T", "qk_rope_head_dim"), ACTIVATIONS),
        TensorSpec("w_uk", ("H", "qk_nope_head_dim", "kv_lora_rank"), ACTIVATIONS),
        TensorSpec("w_uv", ("H", "kv_lora_rank", "v_head_dim"), ACTIVATIONS),
        TensorSpec("cache", ("num_pages", "page_size", "cache_width"), CACHES),
        TensorSpec("block_table", ("B", "max_pages"), (INT32,)),
        TensorSpec("cached_lengths", ("B",), (INT32,)),
        TensorSpec("query_starts", ("B + 1",), (INT32,)),
        TensorSpec("num_tokens", ("1",), (INT32,)),
    ),
    outputs=(
        OutputSpec("attended", ("T", "H", "v_head_dim"), like="q_nope"),
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
    from latentrt.plugins.mla_prefill.reference import mla_prefill

    return mla_prefill(*tensors, **attributes)


register(CONTRACT, _compute)
mla_prefill = torch.ops.latentrt.mla_prefill
mla_prefill_ = torch.ops.latentrt.mla_prefill_
