"""The group of processes that a collective op runs in: torch.distributed's default one."""

import torch.distributed as dist

# names that torch 2.13 gave them; the older ones warn there
gather_rows = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
sum_rows = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class RankError(RuntimeError):
    """A collective op was run outside of a group of as many processes as its graph is for."""


def group(op: str, num_ranks: int) -> dist.ProcessGroup:
    """The group of this process. RankError if there is none of `num_ranks`."""
    found = dist.get_world_size() if dist.is_initialized() else 1
    if not dist.is_initialized() or found != num_ranks:
        raise RankError(f"{op} joins {num_ranks} ranks, this process is one of {found}; load the target by latentrt.load")
    return dist.group.WORLD
