"""NCCL through nccl4py's raw bindings: a communicator of ranks, and the two collectives on a given stream. No torch.

A communicator belongs to the GPU that is current when it is made; making one returns when all ranks have done so.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_UNIQUE_ID_BYTES = 128  # NCCL_UNIQUE_ID_BYTES
_TYPES = {"float32": "Float32", "float16": "Float16", "bfloat16": "Bfloat16", "int32": "Int32"}  # torch's words -> NCCL's


class NcclError(RuntimeError):
    """NCCL is missing, or refuses a call."""


def bindings():
    """nccl4py's module of raw calls. NcclError says what to install."""
    try:
        from nccl.bindings import nccl
    except ImportError as error:
        raise NcclError(f"{error.name} is not installed; pip install 'nccl4py[cu13]'") from None
    return nccl


def unique_id(nccl=None) -> bytes:
    """What one rank makes and all others are told, so that they find each other."""
    with _explained():
        found = (nccl or bindings()).get_unique_id()
    return ctypes.string_at(int(found.ptr), _UNIQUE_ID_BYTES)


@contextmanager
def _explained() -> Iterator[None]:
    """What the bindings raise where the library is missing or refuses, as NcclError."""
    try:
        yield
    except NcclError:
        raise
    except Exception as error:
        raise NcclError(f"{' '.join(str(error).split())}; NCCL comes with pip install 'nccl4py[cu13]'") from None


@dataclass(frozen=True)
class Collective:
    """One call of a plan: `source` and `target` name tensors of the op. count: elements that a rank gives (all_gather) or gets
    (reduce_scatter), of `dtype` in torch's words."""

    function: str
    source: str
    target: str
    count: int
    dtype: str


class Communicator:
    """One rank's end. `capsule` is what TensorRT's execution contexts take."""

    def __init__(self, unique: bytes, rank: int, ranks: int, nccl=None):
        self._nccl = nccl or bindings()
        buffer = ctypes.create_string_buffer(unique, _UNIQUE_ID_BYTES)
        with _explained():
            identity = self._nccl.UniqueId.from_ptr(ctypes.addressof(buffer))
            self.handle = int(self._nccl.comm_init_rank(ranks, identity, rank))

    @property
    def capsule(self):
        """The communicator's address in a capsule."""
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return make(self.handle, None, None)

    def run(self, call: Collective, source: int, target: int, stream: int) -> None:
        """Enqueues a collective on device addresses; the stream may be one that is captured."""
        dtype = getattr(self._nccl.DataType, _TYPES[call.dtype])
        if call.function == "all_gather":
            self._nccl.all_gather(source, target, call.count, dtype, self.handle, stream)
        else:
            self._nccl.reduce_scatter(source, target, call.count, dtype, self._nccl.RedOp.Sum, self.handle, stream)

    def close(self) -> None:
        """Gives it back without waiting for other ranks, which may be gone."""
        if self.handle:
            self._nccl.comm_abort(self.handle)
            self.handle = 0
