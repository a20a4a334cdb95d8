"""What a backend does: run one step of the graph over a ragged batch. See docs/step-graph.md."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from latentrt.plugins.step_graph import FORMS, StepBatch
from latentrt.runtime.bundle.manifest import Target
from latentrt.runtime.errors import RequestError

if TYPE_CHECKING:
    from latentrt.runtime.backends.padding import StepShape

AUTO = "auto"
CPU_CHUNK, LONE_CPU_CHUNK = 256, 512  # prompts of 2,048 are read 13 % faster by 512, and no faster by 1,024
GPU_SHARE = 0.9  # of the free memory goes to the cache: captured graphs and activations come later


@dataclass(frozen=True)
class BackendOptions:
    """How a target is loaded. Raises RequestError for a value that is not accepted.

    cache_tokens: tokens in the latent cache; None: what 1 GiB holds, 8 full contexts at most, on a GPU nine tenths of its
    free memory. threads: 0 for all cores. device: "auto", "cpu", "cuda" or "cuda:1". prefill: "auto" or a form of
    plugins/step_graph.py, for steps that are not of one token a sequence. capture: steps as CUDA graphs.
    custom_ops: "auto", "triton" or "reference", a matter of backend torch. mapped, a matter of backend onnxruntime: weights
    stay in the bundle's files instead of being copied into the layout that its kernels like best. Little memory, slow steps.
    kernels, another: "auto" takes our own, whose weights are always mapped, where they can be compiled; "native" insists on
    them; "onnxruntime" does without. batch_invariant: the bits of a sequence's logits do not depend on what else is in its
    steps (docs/numerics.md), a matter of backend onnxruntime, refused by others.
    """

    cache_tokens: int | None = None
    threads: int = 0
    device: str = AUTO
    prefill: str = AUTO
    capture: bool = True
    custom_ops: str = AUTO
    mapped: bool = False
    kernels: str = AUTO
    batch_invariant: bool = False
    rank: int = 0  # of those that share a target's experts
    place: int = 0  # of the rank among those of its machine

    def __post_init__(self):
        if self.cache_tokens is not None and self.cache_tokens < 1:
            raise RequestError(f"cache_tokens is {self.cache_tokens}, accepted: 1 or more")
        if self.threads < 0:
            raise RequestError(f"threads is {self.threads}, accepted: 0 (all cores) or more")
        if self.kernels not in (accepted := (AUTO, "native", "onnxruntime")):
            raise RequestError(f"kernels is {self.kernels!r}, accepted: {', '.join(accepted)}")
        if self.device != AUTO and not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise RequestError(f"device is {self.device!r}, accepted: auto, cpu, cuda, cuda:1 and so on")
        if self.prefill not in (AUTO, *FORMS):
            raise RequestError(f"prefill is {self.prefill!r}, accepted: {', '.join((AUTO, *FORMS))}")

    @property
    def gpu(self) -> int:
        """Number of the GPU: what `device` names or the first, and for ranks those after it."""
        return int(self.device.partition(":")[2] or 0) + self.place


@dataclass(frozen=True)
class SequenceRows:
    """The new tokens of one sequence in a step. `logits` says which of them get logits, as indices into `tokens`."""

    tokens: Sequence[int]
    cached_length: int
    logits: Sequence[int]


def pack(sequences: Sequence[SequenceRows], block_table: np.ndarray) -> StepBatch:
    """Sequences one after another, without padding; logits come back in the same order. block_table [B, max_pages]."""
    lengths = [len(s.tokens) for s in sequences]
    starts = np.cumsum([0, *lengths])
    positions = [s.cached_length + np.arange(n) for s, n in zip(sequences, lengths, strict=True)]
    rows = [start + np.asarray(s.logits, np.int64) for s, start in zip(sequences, starts, strict=False)]
    return StepBatch(
        input_ids=_int32([t for s in sequences for t in s.tokens]),
        positions=_int32(np.concatenate(positions)),
        query_starts=_int32(starts),
        cached_lengths=_int32([s.cached_length for s in sequences]),
        block_table=_int32(block_table),
        num_tokens=_int32([starts[-1]]),
        logit_rows=_int32(np.concatenate(rows)),
    )


def pack_decoding(tokens: Sequence[int], cached: Sequence[int], block_table: np.ndarray) -> StepBatch:
    """The same for one token of each sequence, which most steps are, with less work."""
    positions, starts = np.array(cached, np.int32), np.arange(len(tokens) + 1, dtype=np.int32)
    return StepBatch(
        input_ids=np.array(tokens, np.int32), positions=positions, query_starts=starts, cached_lengths=positions,
        block_table=_int32(block_table), num_tokens=starts[-1:], logit_rows=starts[:-1],
    )  # fmt: skip


def _int32(values) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.int32)


LOGIT_ROWS = 256  # of one step: every row has logits [vocab_size], and a plan's profiles take as many


SURE, UNSURE, NOT_FINITE = 0, 1, 2  # what `StepResult.draw` says of a row


@dataclass(frozen=True)
class Draws:
    """How the tokens of N logit rows are chosen. numbers [N, 4] float64: temperature (0: the largest logit), top_p, min_p, and
    the uniform number that the token falls on; top_k [N] int32, 0: all."""

    numbers: np.ndarray
    top_k: np.ndarray


class StepResult:
    """What a step computed, for its N logit rows; valid until the backend's next step. This one has the logits on the host.

    Whoever samples asks for `greedy` or `draw` where that is enough: a backend may answer without moving logits.
    """

    can_draw = False  # whether `draw` may be asked

    def __init__(self, logits: np.ndarray):
        self._logits = logits

    def logits(self) -> np.ndarray:
        """[N, vocab_size] float32, on the host."""
        return self._logits

    def greedy(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids [N] int64 of the largest logits (of equal ones the lowest id), and those logits [N] float32.

        The logit is NaN where a row holds a NaN.
        """
        logits = self.logits()
        ids = logits.argmax(-1)
        return ids, np.take_along_axis(logits, ids[:, None], -1)[:, 0]


    def rows(self, places: Sequence[int]) -> np.ndarray:
        """Logits of some rows only, [len(places), vocab_size] float32, on the host."""
        return self.logits()[places]

    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids [N], what is said of them [N], and the largest logits [N]: SURE ids are those of runtime/engine/sampler.py, for
        the same numbers. UNSURE rows have none: they are too close to call here."""
        raise NotImplementedError


class Backend(ABC):
    """A loaded target with a latent cache of `num_pages` pages (page 0 is scratch). A context manager; see `close`."""

    name: str
    target: Target
    num_pages: int
    ranks = 1  # processes that share the experts
    two_passes = False  # whether a step decodes apart from prompts
    alive = True  # whether a step could be run
    gpu: str | None = None  # the GPU that it runs on, for people; None: the CPU

    @property
    def pages_by_rank(self) -> list[int]:
        """Pages of every rank's latent cache: a sequence lives on one rank."""
        return [self.num_pages]

    @property
    def prefill_chunk(self) -> int:
        """Rows of prompts that a step should hold: few, so that sequences that decode need not wait for long."""
        return CPU_CHUNK

    @property
    def lone_prefill_chunk(self) -> int:
        """The same for a step in which no sequence decodes."""
        return max(self.prefill_chunk, LONE_CPU_CHUNK)

    @abstractmethod
    def step(self, batch: StepBatch) -> StepResult:
        """Runs one step; appends to the cache. EngineLostError if no later step can run either."""

    def step_ranks(self, batches: Sequence[StepBatch | None], copies: Sequence[Sequence[tuple[int, int]]]) -> StepResult:
        """`copy_pages`, then `step`, with pages and a batch for every rank; None where a rank has nothing to do.

        Logits come rank by rank.
        """
        (batch,), (pages,) = batches, copies
        if pages:
            self.copy_pages(pages)
        return self.step(batch)

    def step_padded(self, batch: StepBatch, least: "StepShape", decoding: bool) -> StepResult:
        """One pass of a step of several ranks: `batch`, which may be empty, padded to the shape `least` or, as on all ranks, a
        larger one. `decoding`: it has one token a sequence. The result is valid until the next pass."""
        raise NotImplementedError

    @abstractmethod
    def copy_pages(self, pages: Sequence[tuple[int, int]]) -> None:
        """Copies pages of all latent caches, (from, to) each, before the next step. No page is both."""

    def close(self) -> None:  # noqa: B027 (most backends leave it to Python)
        """Gives back what the backend holds; a second call does nothing. No step may follow."""

    def __enter__(self) -> "Backend":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def pages_for(target: Target, cache_tokens: int | None, budget: int = 1 << 30, contexts: int = 8) -> int:
    """Number of pages for `cache_tokens` tokens; by default as many as `budget` bytes hold, `contexts` full ones at most."""
    spec = target.cache
    if cache_tokens is None:
        cache_tokens = min(max(budget // spec.bytes_per_token, spec.page_size), contexts * target.limits.max_context)
    return 1 + -(-cache_tokens // spec.page_size)


def gpu_pages_for(target: Target, cache_tokens: int | None, free: int) -> int:
    """The same on a GPU with `free` bytes, weights and activations counted already: by default most of them."""
    return pages_for(target, cache_tokens, int(GPU_SHARE * free), target.limits.max_sequences)
