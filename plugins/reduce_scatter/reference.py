"""`reduce_scatter` through torch.distributed: gloo on the CPU, NCCL on GPUs."""

import torch

from latentrt.plugins.ranks import group, sum_rows


def reduce_scatter(x: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """x [num_ranks * T, width] on every rank -> its own [T, width], summed. Waits for all ranks. RankError outside one."""
    y = torch.empty((x.shape[0] // num_ranks, x.shape[1]), dtype=x.dtype, device=x.device)
    sum_rows(y, x.contiguous(), group=group("reduce_scatter", num_ranks))
    return y
