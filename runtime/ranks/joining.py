"""How ranks meet for their collectives: one row per backend."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
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
        import os
        import socket

        import torch.distributed as dist

        from latentrt.runtime.ranks import messages

        host = "127.0.0.1" if messages.alone(os.environ.get(messages.ADDRESS, "tcp:")) else socket.gethostname()
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


class NcclJoining(Joining):
    """A communicator of NCCL, for the collectives of TensorRT engines."""

    def __init__(self, options: "BackendOptions"):
        self._gpu = options.gpu

    def invite(self) -> bytes:
        from latentrt.plugins.launch import nccl

        with _as_bundle_errors(0, self._gpu):
            return nccl.unique_id()

    def join(self, invitation: bytes, rank: int, ranks: int) -> None:
        from latentrt.plugins.launch import nccl
        from latentrt.runtime.backends.tensorrt.device import open_device

        self.rank, self.ranks = rank, ranks
        with _as_bundle_errors(rank, self._gpu):
            open_device(self._gpu)  # current from here on
            self.given = (nccl.Communicator(invitation, rank, ranks),)


@contextmanager
def _as_bundle_errors(rank: int, gpu: int) -> Iterator[None]:
    """What a machine lacks, in words for whoever started the ranks."""
    from latentrt.plugins.launch.nccl import NcclError
    from latentrt.runtime.backends.tensorrt.device import CudaError, NoGpuError
    from latentrt.runtime.errors import BundleError

    try:
        yield
    except (NcclError, CudaError, NoGpuError) as error:
        found = f"rank {rank} needs GPU {gpu} and NCCL: {error}"
        raise BundleError(f"{found}; use backend 'torch' with device 'cpu', or a machine with a GPU for each rank") from None


_JOININGS = {"torch": TorchJoining, "tensorrt": NcclJoining, "tensorrt_rtx": NcclJoining}


def of(kind: str, options: "BackendOptions") -> Joining:
    """The way of a backend."""
    return _JOININGS[kind](options)
