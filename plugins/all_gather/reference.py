"""`all_gather` through torch.distributed: gloo on the CPU, NCCL on GPUs."""

import torch

from latentrt.plugins.ranks import gather_rows, group


def all_gather(x: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """x [T, width] of every rank -> [num_ranks * T, width]. Waits for all ranks. RankError outside of such a group."""
    y = torch.empty((num_ranks * x.shape[0], x.shape[1]), dtype=x.dtype, device=x.device)
    gather_rows(y, x.contiguous(), group=group("all_gather", num_ranks))
    return y
