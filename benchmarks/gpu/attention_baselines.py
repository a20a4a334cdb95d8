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
            run.skip_once(name, f"{type(error).__name__}: {error}")
    return found


def _sdpa(sets: list[list], length: int, scale: float) -> Callable[[], None]:
    """Heads as query rows over one key head: q [B, 1, H, 576], k [B, 1, L, 576], v [B, 1, L, 512]; keys of its own per set."""
    cache, rank = sets[0][4], sets[0][0].shape[-1]
    if sum(s[5].numel() for s in sets) * cache[0].nbytes > _MOST_KEYS:
        raise MemoryError("contiguous keys would take too much memory")
    operands = [(torch.cat(s[:2], -1)[:, None], cache[s[5].long()].flatten(1, 2)[:, None, :length]) for s in sets]

    def run_all() -> None:
        for q, keys in operands:
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
    """A wrapper per set: a plan holds the pages that it reads. They share a workspace, since they run one after another."""
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    rank, workspace = sets[0][0].shape[2], torch.empty(128 << 20, dtype=torch.int8, device=sets[0][0].device)
    wrappers = []
    for q, pe, _, _, cache, table, lengths, starts, _ in sets:
        wrappers.append(BatchMLAPagedAttentionWrapper(workspace))
        pages = torch.arange(0, table.numel() + 1, table.shape[1], dtype=torch.int32, device=q.device)
        shape = q.shape[1], q.shape[2], pe.shape[2], cache.shape[1]
        wrappers[-1].plan(starts, pages, table.flatten(), lengths + 1, *shape, False, scale, q.dtype, cache.dtype)

    def run_all() -> None:
        for wrapper, s in zip(wrappers, sets, strict=True):
            wrapper.run(s[0], s[1], s[4][..., :rank], s[4][..., rank:])

    return run_all
