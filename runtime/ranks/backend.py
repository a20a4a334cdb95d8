"""A target of several ranks as one backend: it schedules nothing, and runs no graph itself."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from latentrt.plugins.step_graph import StepBatch
from latentrt.runtime.backends.base import Backend, BackendOptions, Draws, StepResult
from latentrt.runtime.bundle.manifest import Target
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.errors import EngineLostError
from latentrt.runtime.ranks.group import RankGroup
from latentrt.runtime.ranks.lockstep import passes

CLOSE_SECONDS = 10.0  # for ranks to keep what they compiled


class RanksBackend(Backend):
    """Runs a target on as many processes as it has ranks; rank r takes GPU r. Every rank has a latent cache of its own.

    kind: the backend that each rank runs. EngineLostError once a rank is gone: no step can follow.
    """

    def __init__(self, bundle: Bundle, name: str, target: Target, options: BackendOptions, kind: str):
        self.name, self.target, self.ranks = name, target, target.ranks
        self.group = RankGroup(self.ranks)
        try:
            self._load(bundle, options, kind)
        except BaseException:
            self.group.close()
            raise

    def _load(self, bundle: Bundle, options: BackendOptions, kind: str) -> None:
        own = [_rank_options(options, rank, self.ranks) for rank in range(self.ranks)]
        (invitation,) = self.group.call("invite", {0: (kind, own[0])})
        found = self.group.call("load", {
            rank: (bundle.path.absolute(), self.name, kind, own[rank], self.ranks, invitation) for rank in range(self.ranks)
        })  # fmt: skip
        self._pages = [rank["num_pages"] for rank in found]
        self.num_pages = min(self._pages)
        self.gpu = found[0]["gpu"]
        self._chunks, self._two_passes = found[0]["chunks"], found[0]["two_passes"]

    @property
    def pages_by_rank(self) -> list[int]:
        return self._pages

    @property
    def prefill_chunk(self) -> int:
        return self._chunks[0]

    @property
    def lone_prefill_chunk(self) -> int:
        return self._chunks[1]

    @property
    def alive(self) -> bool:
        return self.group.alive

    def step(self, batch: StepBatch) -> StepResult:
        return self.step_ranks([batch, *[None] * (self.ranks - 1)], [()] * self.ranks)

    def step_ranks(self, batches: Sequence[StepBatch | None], copies: Sequence[Sequence[tuple[int, int]]]) -> StepResult:
        cut = passes(batches, self.target.cache.page_size, self._two_passes)
        draws = self.group.call("step", {rank: (copies[rank], cut[rank]) for rank in range(self.ranks)})
        return RanksResult(self.group, [0 if batch is None else len(batch.logit_rows) for batch in batches], any(draws))

    def copy_pages(self, pages: Sequence[tuple[int, int]]) -> None:
        raise NotImplementedError("pages are copied with a step, each on its rank")

    def close(self) -> None:
        if self.group.alive:
            with suppress(EngineLostError):  # it ends all ranks anyway
                self.group.call_all("close", seconds=CLOSE_SECONDS)
        self.group.close()


def _rank_options(options: BackendOptions, rank: int, ranks: int) -> BackendOptions:
    """A rank's own: on the CPU it has its share of the cores."""
    threads = max(1, (options.threads or len(os.sched_getaffinity(0))) // ranks)
    return replace(options, threads=threads, rank=rank)


class RanksResult(StepResult):
    """What a step computed on all ranks, rank 0's rows first. Logits stay where they are until somebody asks."""

    def __init__(self, group: RankGroup, counts: list[int], can_draw: bool):
        self._group, self._counts, self.can_draw = group, counts, can_draw
        self._logits_here: np.ndarray | None = None

    def logits(self) -> np.ndarray:
        if self._logits_here is None:
            self._logits_here = np.concatenate(self._group.call("logits", dict.fromkeys(self._told, ())))
        return self._logits_here

    def greedy(self) -> tuple[np.ndarray, np.ndarray]:
        return self._joined(self._group.call("greedy", dict.fromkeys(self._told, ())))

    def rows(self, places: Sequence[int]) -> np.ndarray:
        if self._logits_here is not None:
            return self._logits_here[places]
        starts, places = np.cumsum([0, *self._counts]), np.asarray(places)
        owners = np.searchsorted(starts, places, side="right") - 1
        asked = {int(rank): ((places[owners == rank] - starts[rank]).tolist(),) for rank in np.unique(owners)}
        found = self._group.call("rows", asked)
        rows = np.empty((len(places), found[0].shape[1]), found[0].dtype)
        for rank, values in zip(asked, found, strict=True):
            rows[owners == rank] = values
        return rows

    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        starts = np.cumsum([0, *self._counts])
        own = {rank: slice(starts[rank], starts[rank + 1]) for rank in self._told}
        return self._joined(self._group.call("draw", {
            rank: (Draws(draws.numbers[part], draws.top_k[part]),) for rank, part in own.items()
        }))  # fmt: skip

    @property
    def _told(self) -> list[int]:
        """Ranks that have logits."""
        return [rank for rank, count in enumerate(self._counts) if count]

    def _joined(self, found: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
        return tuple(np.concatenate(arrays) for arrays in zip(*found, strict=True))
