"""The step graph's contract: its inputs and outputs, their dimensions, the names inside, and the forms in which it attends.

This module is their one owner: tracing, padding, every backend, the look inside a graph and the manifest derive from it.
A step takes T token rows of B sequences: rows query_starts[b] .. query_starts[b + 1] are the new tokens of sequence b, whose
first cached_lengths[b] tokens lie in the latent cache, on the pages block_table[b]. The N rows logit_rows get logits. Rows
at or beyond num_tokens are padding. See docs/step-graph.md.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

import numpy as np

FORMS = ABSORBED, EXPANDED = "absorbed", "expanded"  # of attention, over the same weights and caches
DECODE_FORM = ABSORBED  # of steps with one new token a sequence
LOGITS, LAST_HIDDEN = "logits", "last_hidden"
# Dimensions without a fixed size: rows of the step, sequences, rows with logits, the block table's width, the cache's pages.
DYNAMIC = TOKENS, SEQUENCES, LOGIT_ROWS, MAX_PAGES, NUM_PAGES = "T", "B", "N", "max_pages", "num_pages"
Dim = int | str  # a size, a name of DYNAMIC, or "name + size"


def _dims(*dims: Dim):
    return field(metadata={"dims": dims})


@dataclass(frozen=True)
class StepBatch:
    """Inputs of one step, all int32. The fields are the graph's inputs, in its order."""

    input_ids: np.ndarray = _dims(TOKENS)
    positions: np.ndarray = _dims(TOKENS)
    query_starts: np.ndarray = _dims(f"{SEQUENCES} + 1")
    cached_lengths: np.ndarray = _dims(SEQUENCES)
    block_table: np.ndarray = _dims(SEQUENCES, MAX_PAGES)
    num_tokens: np.ndarray = _dims(1)
    logit_rows: np.ndarray = _dims(LOGIT_ROWS)


INPUTS: dict[str, tuple[Dim, ...]] = {f.name: f.metadata["dims"] for f in fields(StepBatch)}
FIRST_EXPERT = "first_expert"
RANK_INPUTS: dict[str, tuple[Dim, ...]] = {FIRST_EXPERT: (1, 1)}  # int32, beside those of a step, where ranks share the experts


def inputs(ranks: int = 1) -> dict[str, tuple[Dim, ...]]:
    """All inputs of a graph but caches and weights, by name, for so many ranks that share the experts."""
    return INPUTS | (RANK_INPUTS if ranks > 1 else {})


def first_expert(rank: int, ranks: int, num_experts: int) -> np.ndarray:
    """What a rank's graph gets as `first_expert` [1, 1]."""
    return np.full(RANK_INPUTS[FIRST_EXPERT], rank * (num_experts // ranks), np.int32)


def size(dim: Dim, sizes: Mapping[str, int]) -> int:
    """The size of a dimension, given those of the dynamic ones."""
    if isinstance(dim, int):
        return dim
    name, _, more = dim.partition(" + ")
    return sizes[name] + int(more or 0)


def input_shapes(sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of all inputs, by name."""
    return {name: tuple(size(d, sizes) for d in dims) for name, dims in INPUTS.items()}


@dataclass(frozen=True)
class Limits:
    """What an engine can be asked for."""

    max_context: int  # tokens of one sequence, prompt and answer together
    max_batch_tokens: int = 2048  # rows of one step
    max_sequences: int = 256  # sequences of one step

    def max_pages(self, page_size: int) -> int:
        """Pages of the longest sequence."""
        return -(-self.max_context // page_size)


def cache_name(layer: int) -> str:
    """Input of a layer's latent cache [num_pages, page_size, width]."""
    return f"latent_cache.{layer}"


def updated(name: str) -> str:
    """The output that is the cache `name` after the step; it may share the input's memory."""
    return f"{name}.updated"


def caches(layers: int) -> dict[str, str]:
    """Every layer's cache, input -> output, in order."""
    return {cache_name(i): updated(cache_name(i)) for i in range(layers)}


def count_caches(inputs: Iterable[str]) -> int:
    """How many of these inputs are latent caches."""
    names = set(inputs)
    return next(i for i in range(len(names) + 1) if cache_name(i) not in names)


def layer_prefix(layer: int) -> str:
    """What the names of all nodes, values and weights of a layer begin with."""
    return f"model.layers.{layer}."


def attention_output(layer: int) -> str:
    """What self_attn adds to the residual, [T, hidden_size]."""
    return f"{layer_prefix(layer)}self_attn.output"


def mlp_output(layer: int) -> str:
    """What the MLP or MoE block adds to the residual, [T, hidden_size]."""
    return f"{layer_prefix(layer)}mlp.output"


def layer_output(layer: int) -> str:
    """The hidden state after a layer, [T, hidden_size]."""
    return f"{layer_prefix(layer)}output"
