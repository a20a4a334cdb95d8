"""Plain torch form of `mla_attention`: the naive twin of every kernel and plugin. Loops over sequences, clear not fast."""

from collections.abc import Iterator

import torch

from latentrt.plugins import cache_formats


def mla_attention(
    q_latent: torch.Tensor,  # [T, H, kv_lora_rank]
    q_pe: torch.Tensor,  # [T, H, qk_rope_head_dim]
    latent: torch.Tensor,  # [T, kv_lora_rank]
    k_pe: torch.Tensor,  # [T, qk_rope_head_dim]
    cache: torch.Tensor,  # [num_pages, page_size, cache_width]
    block_table: torch.Tensor,  # [B, max_pages] int32
    cached_lengths: torch.Tensor,  # [B] int32
    query_starts: torch.Tensor,  # [B + 1] int32
    num_tokens: torch.Tensor,  # [1] int32
    softmax_scale: float,
    cache_format: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns attended [T, H, kv_lora_rank] and the updated cache (a copy). Scores and sums are float32."""
    cache, attended = cache.clone(), torch.zeros_like(q_latent)
    batch = latent, k_pe, cache, block_table, cached_lengths, query_starts, num_tokens, cache_format
    for rows, past, keys, keys_pe in appended(*batch):
        attended[rows] = _attend(q_latent[rows], q_pe[rows], keys, keys_pe, past, softmax_scale)
    return attended, cache


def appended(
    latent, k_pe, cache, block_table, cached_lengths, query_starts, num_tokens, cache_format: str
) -> Iterator[tuple[slice, int, torch.Tensor, torch.Tensor]]:
    """Appends to `cache`, sequence by sequence: its rows, the tokens before them, keys [total, rank] and [total, rope].

    Sequences without new rows are left out.
    """
    layout, page_size = cache_formats.get(cache_format), cache.shape[1]
    encoded = layout.encode(latent, k_pe)
    starts = query_starts.tolist()
    for b, past in enumerate(cached_lengths.tolist()):
        rows = slice(starts[b], min(starts[b + 1], int(num_tokens)))
        total = past + rows.stop - rows.start
        if total <= past:
            continue
        positions = torch.arange(total)
        pages, slots = block_table[b].cpu().long()[positions // page_size], positions % page_size
        cache[pages[past:], slots[past:]] = encoded[rows]
        yield rows, past, *layout.decode(cache[pages, slots], latent.shape[-1], k_pe.shape[-1])


def _attend(q_latent, q_pe, keys, keys_pe, past: int, softmax_scale: float) -> torch.Tensor:
    """Causal attention of n rows at positions past .. past + n over keys [total, rank]; [n, H, rank]."""
    wide = torch.promote_types(q_latent.dtype, torch.float32)
    keys = keys.to(wide)
    scores = torch.einsum("nhr,tr->nht", q_latent.to(wide), keys)
    scores = (scores + torch.einsum("nhr,tr->nht", q_pe.to(wide), keys_pe.to(wide))) * softmax_scale
    rows, columns = torch.arange(scores.shape[0]), torch.arange(scores.shape[2])
    future = (columns[None, :] > rows[:, None] + past).to(scores.device)  # [n, total]
    weights = scores.masked_fill(future[:, None, :], float("-inf")).softmax(-1)
    return torch.einsum("nht,tr->nhr", weights, keys).to(q_latent.dtype)
