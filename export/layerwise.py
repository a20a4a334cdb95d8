"""A family's model layer by layer in float32 PyTorch: what calibration and the ranking of weights run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from latentrt.export.models.base import Config, page_shape
from latentrt.plugins.step_graph import StepBatch

_PAGE, _CHUNK = 64, 256  # the cache's page; rows at once, which bounds the attention scores [rows, heads, tokens]
_WIDE = 1024  # hidden_size from which threads help; at 192, two were 7 to 20 times slower than one on two shared cores


@contextmanager
def threads_for(config: Config) -> Iterator[None]:
    """One thread where products are so small that several only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if config.hidden_size < _WIDE else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_layer(layer: nn.Module, tokens: Sequence[int], hidden: Tensor, angles: list[Tensor], config: Config) -> Tensor:
    """One whole sequence through the layer, [T, hidden_size] -> the same, in chunks over a cache of its own."""
    cache, parts = torch.zeros(-(-len(tokens) // _PAGE), *page_shape(config, "float32", _PAGE)), []
    for start in range(0, len(tokens), _CHUNK):
        rows = slice(start, start + _CHUNK)
        part, cache, *_ = layer(hidden[rows], *(a[rows] for a in angles), cache, one_sequence(tokens[rows], start))
        parts.append(part)
    return torch.cat(parts)


def one_sequence(tokens: Sequence[int], cached: int = 0, logit_rows: Sequence[int] = ()) -> dict[str, Tensor]:
    """The step of one sequence that has `cached` tokens in the cache, on pages 0, 1, ...; `logit_rows` get logits."""
    count = len(tokens)
    step = StepBatch(
        input_ids=np.array(tokens), positions=cached + np.arange(count), query_starts=np.array([0, count]),
        cached_lengths=np.array([cached]), block_table=np.arange(-(-(cached + count) // _PAGE))[None],
        num_tokens=np.array([count]), logit_rows=np.array(logit_rows),
    )  # fmt: skip
    return {name: torch.from_numpy(value.astype(np.int32)) for name, value in vars(step).items()}
