"""Plain torch form of `mla_prefill`: keys and values are expanded from the latent, then plain causal attention."""

import torch

from latentrt.plugins.mla_attention.reference import appended


def mla_prefill(
    q_nope: torch.Tensor,  # [T, H, qk_nope_head_dim]
    q_pe: torch.Tensor,  # [T, H, qk_rope_head_dim]
    latent: torch.Tensor,  # [T, kv_lora_rank]
    k_pe: torch.Tensor,  # [T, qk_rope_head_dim]
    w_uk: torch.Tensor,  # [H, qk_nope_head_dim, kv_lora_rank]
    w_uv: torch.Tensor,  # [H, kv_lora_rank, v_head_dim]
    cache: torch.Tensor,  # [num_pages, page_size, cache_width]
    block_table: torch.Tensor,  # [B, max_pages] int32
    cached_lengths: torch.Tensor,  # [B] int32
    query_starts: torch.Tensor,  # [B + 1] int32
    num_tokens: torch.Tensor,  # [1] int32
    softmax_scale: float,
    cache_format: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns attended [T, H, v_head_dim] and the updated cache (a copy). Keys, values, scores and sums are float32."""
    wide = torch.promote_types(q_nope.dtype, torch.float32)
    cache, attended = cache.clone(), q_nope.new_zeros(*q_nope.shape[:2], w_uv.shape[2])
    batch = latent, k_pe, cache, block_table, cached_lengths, query_starts, num_tokens, cache_format
    for rows, past, keys_latent, keys_pe in appended(*batch):
        keys_latent, keys_pe = keys_latent.to(wide), keys_pe.to(wide)  # [total, rank], [total, rope]
        keys = torch.einsum("tr,hnr->htn", keys_latent, w_uk.to(wide))  # [H, total, qk_nope]
        values = torch.einsum("tr,hrv->htv", keys_latent, w_uv.to(wide))  # [H, total, v_head_dim]
        scores = torch.einsum("nhd,htd->hnt", q_nope[rows].to(wide), keys)
        scores = (scores + torch.einsum("nhd,td->hnt", q_pe[rows].to(wide), keys_pe)) * softmax_scale
        positions, columns = torch.arange(past, past + scores.shape[1]), torch.arange(scores.shape[2])
        future = (columns[None, :] > positions[:, None]).to(scores.device)  # [n, total]
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        attended[rows] = torch.einsum("hnt,htv->nhv", weights, values).to(attended.dtype)
    return attended, cache
