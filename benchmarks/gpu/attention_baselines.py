"""Other implementations of decode attention over a latent cache, on the same arguments."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.gpu.run import Run

_MOST_KEYS = 4 << 30  # bytes of contiguous keys that a baseline may copy


def candidates(run: Run, sets: list[list], length: int, scale: float) -> dict[str, Callable[[], None]]:
    """Name -> what runs all sets. What cannot be had is noted once."""
    found = {}
    for name, make in (("torch_sdpa", _sdpa), ("flash_mla", _flash_mla), ("flashinfer", _flashinfer)):
        try:
            found[name] = make(sets, length, scale)
            found[name]()
        except Exception as error:  # a baseline that is missing or refuses must not end the section
            found.pop(name, None)
            if not any(s["name"] == name for s in run.skipped):
                run.skip(name, f"{type(error).__name__}: {error}")
    return found


def _sdpa(sets: list[list], length: int, scale: float) -> Callable[[], None]:
    """Heads as query rows over one key head: q [B, 1, H, 576], k [B, 1, L, 576], v [B, 1, L, 512]."""
    cache, table = sets[0][4], sets[0][5]
    if table.numel() * cache[0].nbytes > _MOST_KEYS:
        raise MemoryError("contiguous keys would take too much memory")
    rank = sets[0][0].shape[-1]
    keys = cache[table.long()].flatten(1, 2)[:, None, :length]
    queries = [torch.cat(s[:2], -1)[:, None] for s in sets]

    def run_all() -> None:
        for q in queries:
            F.scaled_dot_product_attention(q, keys, keys[..., :rank], scale=scale)

    return run_all


def _flash_mla(sets: list[list], length: int, scale: float) -> Callable[[], None]:
    try:
        import flash_mla
    except ImportError:
        import sgl_flash_mla as flash_mla
    heads, rank = sets[0][0].shape[1:]
    lengths = sets[0][6] + 1
    metadata, splits = flash_mla.get_mla_metadata(lengths, heads, 1)
    queries = [torch.cat(s[:2], -1)[:, None] for s in sets]

    def run_all() -> None:
        for q, s in zip(queries, sets, strict=True):
            flash_mla.flash_mla_with_kvcache(
                q, s[4][:, :, None], s[5], lengths, rank, metadata, splits, softmax_scale=scale, causal=True
            )

    return run_all


def _flashinfer(sets: list[list], length: int, scale: float) -> Callable[[], None]:
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    q, pe, _, _, cache, table, lengths, starts, _ = sets[0]
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(128 << 20, dtype=torch.int8, device=q.device))
    pages = torch.arange(0, table.numel() + 1, table.shape[1], dtype=torch.int32, device=q.device)
    shape = q.shape[1], q.shape[2], pe.shape[2], cache.shape[1]
    wrapper.plan(starts, pages, table.flatten(), lengths + 1, *shape, False, scale, q.dtype, cache.dtype)
    rank = q.shape[2]

    def run_all() -> None:
        for s in sets:
            wrapper.run(s[0], s[1], s[4][..., :rank], s[4][..., rank:])

    return run_all
