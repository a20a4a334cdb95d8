"""Which form of attention runs a step that no captured graph takes: absorbed or expanded, by counting operations.

Both give the same numbers from the same cache. Absorbed attends in the latent space, where a pair of a new row and a cached
token takes 2 kv_lora_rank + qk_rope_head_dim multiplications a head; expanded takes qk_nope_head_dim + qk_rope_head_dim +
v_head_dim, and expands every cached token of a sequence once a step. So long chunks are expanded, and few rows over a long
prefix are absorbed. The kernels' grids go over all slots of the block table, since they know no lengths; an empty slot counts
as EMPTY_SLOT of an expansion (40 us for a segment, estimated). The counts were never measured against a GPU's clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from runtime.bundle import BundleError
from runtime.manifest import Target

ABSORBED, EXPANDED = "absorbed", "expanded"
ASKED = ("auto", ABSORBED, EXPANDED)
EMPTY_SLOT = 0.15


@dataclass(frozen=True)
class Chooser:
    """Decides per step; `asked` other than "auto" forces one form. The sizes are those of one head."""

    asked: str
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    page_size: int

    def form(self, query_starts: np.ndarray, cached_lengths: np.ndarray, block_table: np.ndarray) -> str:
        """query_starts [B + 1], cached_lengths [B], block_table [B, max_pages] -> "absorbed" or "expanded"."""
        if self.asked != "auto":
            return self.asked
        absorbed, expanded = self.multiplications(query_starts, cached_lengths)
        new = np.diff(np.asarray(query_starts, np.int64))
        used = int((new + np.asarray(cached_lengths, np.int64))[new > 0].sum())
        slots = min(len(new), int(new.sum())) * block_table.shape[1] * self.page_size
        expanded += EMPTY_SLOT * max(0, slots - used) * self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)
        return EXPANDED if expanded < absorbed else ABSORBED

    def multiplications(self, query_starts: np.ndarray, cached_lengths: np.ndarray) -> tuple[int, int]:
        """Multiplications of one head in a step: absorbed, expanded. Products that both forms share are left out."""
        new = np.diff(np.asarray(query_starts, np.int64))
        past = np.where(new > 0, np.asarray(cached_lengths, np.int64), 0)  # nothing is expanded for a sequence without rows
        pairs = int((new * past + new * (new + 1) // 2).sum())
        rank, rope = self.kv_lora_rank, self.qk_rope_head_dim
        up = rank * (self.qk_nope_head_dim + self.v_head_dim)  # w_uk and w_uv: of every row, or of every cached token
        absorbed = pairs * (2 * rank + rope) + int(new.sum()) * up
        expanded = pairs * (self.qk_nope_head_dim + rope + self.v_head_dim) + int((past + new).sum()) * up
        return absorbed, expanded


def chooser(where: str, target: Target, config: Mapping, asked: str = "auto") -> Chooser | None:
    """What decides for a target of a model with this configuration; None where there is only the absorbed form.

    `where` names the target in errors. BundleError if `asked` is no form, or one that the target lacks.
    """
    if asked not in ASKED:
        raise BundleError(f"{where}: prefill is {asked!r}, accepted: {', '.join(ASKED)}")
    if target.expanded is None:
        if asked == EXPANDED:
            found = f"{where}: prefill is 'expanded', but it has no expanded engine, accepted: auto, absorbed"
            raise BundleError(f"{found}; a GPU target gets one by build.py --prefill expanded")
        return None
    sizes = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return Chooser(asked, *(config[size] for size in sizes), target.cache.page_size)
