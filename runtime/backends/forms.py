"""Which form of attention runs a step that is not of one token a sequence, by counting operations.

All forms give the same numbers from the same cache. Absorbed attends in the latent space, where a pair of a new row and a
cached token takes 2 kv_lora_rank + qk_rope_head_dim multiplications a head; expanded takes qk_nope_head_dim +
qk_rope_head_dim + v_head_dim, and expands every cached token of a sequence once a step. So long chunks are expanded, and few
rows over a long prefix are absorbed. The kernels' grids go over all slots of the block table, since they know no lengths; an
empty slot counts as EMPTY_SLOT of an expansion (40 us for a segment, estimated). The counts were never measured against a
GPU's clock.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from latentrt.plugins.step_graph import ABSORBED, EXPANDED, StepBatch
from latentrt.runtime.backends.base import AUTO
from latentrt.runtime.backends.padding import StepShape
from latentrt.runtime.bundle.manifest import Target
from latentrt.runtime.errors import BundleError

EMPTY_SLOT = 0.15
RUN_ON_A_GPU = (512, 128, 64, 128)  # sizes of the family's heads, for which an H100 gave right numbers in both forms


@dataclass(frozen=True)
class Head:
    """Sizes of one attention head, and of a page of the cache."""

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    page_size: int

    @property
    def up(self) -> int:
        """Multiplications of one row, or one cached token, by w_uk and w_uv."""
        return self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)


def run_on_a_gpu(choose: "FormChooser") -> "FormChooser":
    """`choose`, less the expanded form if it would choose that for heads of other sizes than RUN_ON_A_GPU.

    On an H100 the expanded kernels of narrow heads (qk_nope_head_dim and v_head_dim 32, kv_lora_rank 64) ended in an illegal
    address, though nothing is wrong with them in the sanitizing interpreter; the absorbed ones of the same model were right.
    """
    head = choose.head
    sizes = head and (head.kv_lora_rank, head.qk_nope_head_dim, head.qk_rope_head_dim, head.v_head_dim)
    return FormChooser((ABSORBED,)) if head and ABSORBED in choose.forms and sizes != RUN_ON_A_GPU else choose


def absorbed(head: Head, batch: StepBatch, shape: StepShape) -> float:
    """Multiplications of one head in an absorbed step. Products that all forms share are left out."""
    new, _, pairs = _counts(batch)
    return pairs * (2 * head.kv_lora_rank + head.qk_rope_head_dim) + int(new.sum()) * head.up


def expanded(head: Head, batch: StepBatch, shape: StepShape) -> float:
    """The same in an expanded step, the empty slots of the padded block table included."""
    new, past, pairs = _counts(batch)
    used = int((past + new).sum())
    slots = min(shape.sequences, shape.rows) * shape.max_pages * head.page_size
    per_pair = head.qk_nope_head_dim + head.qk_rope_head_dim + head.v_head_dim
    return pairs * per_pair + (used + EMPTY_SLOT * max(0, slots - used)) * head.up


COSTS: dict[str, Callable[[Head, StepBatch, StepShape], float]] = {ABSORBED: absorbed, EXPANDED: expanded}


def _counts(batch: StepBatch) -> tuple[np.ndarray, np.ndarray, int]:
    """New rows and cached tokens of every sequence that has new rows (0 of the others), and pairs of both."""
    new = np.diff(batch.query_starts.astype(np.int64))
    past = np.where(new > 0, batch.cached_lengths.astype(np.int64), 0)
    return new, past, int((new * past + new * (new + 1) // 2).sum())


@dataclass(frozen=True)
class FormChooser:
    """Decides per step among the forms that a target has."""

    forms: tuple[str, ...]
    head: Head | None = None  # needed where there is a choice

    def form(self, batch: StepBatch, shape: StepShape | None = None) -> str:
        """The form of `forms` with the fewest multiplications, the first among equals. shape: what `batch` is padded to."""
        if len(self.forms) == 1:
            return self.forms[0]
        shape = shape or StepShape.of(batch)
        return min(self.forms, key=lambda form: COSTS[form](self.head, batch, shape))


def chooser(where: str, target: Target, config: Mapping, asked: str = AUTO) -> FormChooser:
    """What decides for a target of a model with this configuration; `asked` other than "auto" is always taken.

    `where` names the target in errors. BundleError if the target has no engine of the form `asked`.
    """
    if asked == AUTO:
        if len(target.engines) == 1:
            return FormChooser(tuple(target.engines))
        sizes = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        return FormChooser(tuple(target.engines), Head(*(config[size] for size in sizes), target.cache.page_size))
    if asked not in target.engines:
        found = f"{where}: prefill is {asked!r}, but it has no {asked} engine, accepted: {', '.join((AUTO, *target.engines))}"
        raise BundleError(f"{found}; a GPU target gets one by latentrt build --prefill {asked}")
    return FormChooser((asked,))
