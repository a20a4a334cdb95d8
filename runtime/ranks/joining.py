"""How ranks meet for their collectives: one row per backend."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentrt.runtime.backends.base import BackendOptions


class Joining(ABC):
    """One rank's way into the group. `rank` and `ranks` are known after `join`."""

    rank = 0
    ranks = 1
    given: tuple = ()  # what a backend is told beside its options

    @abstractmethod
    def invite(self):
        """What the first rank tells the others."""

    @abstractmethod
    def join(self, invitation, rank: int, ranks: int) -> None:
        """Returns when all ranks are there."""


class TorchJoining(Joining):
    """torch.distributed: gloo for the CPU, NCCL for GPUs. The first rank keeps the store."""

    def __init__(self, options: "BackendOptions"):
        from latentrt.runtime.backends.torch.backend import resolve_device

        self.device = resolve_device(options.device, options.gpu)
        self._store = None

    def invite(self) -> tuple[str, int]:
        """Host and port of the store."""
        import socket

        import torch.distributed as dist

        host = "127.0.0.1" if self._alone else socket.gethostname()
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, self._store.port

    def join(self, invitation: tuple[str, int], rank: int, ranks: int) -> None:
        import torch
        import torch.distributed as dist

        self.rank, self.ranks = rank, ranks
        store = self._store or dist.TCPStore(*invitation, is_master=False)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        kind = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(kind, store=dist.PrefixStore("ranks", store), rank=rank, world_size=ranks)

    @property
    def _alone(self) -> bool:
        """Whether all ranks are on this machine, so that the loopback is enough."""
        import os

        from latentrt.runtime.ranks import messages

        return not os.environ.get(messages.ADDRESS, "tcp:").startswith("tcp:")


_JOININGS = {"torch": TorchJoining}


def of(kind: str, options: "BackendOptions") -> Joining:
    """The way of a backend."""
    return _JOININGS[kind](options)
