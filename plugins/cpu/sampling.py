"""Chooses tokens from logits on the host, by the library of own kernels: what plugins/sampling does on GPUs."""

import ctypes
from functools import lru_cache
from pathlib import Path

import numpy as np

_ARGUMENTS = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, *[ctypes.c_void_p] * 5]


class TokenChooser:
    """Keeps what rows of logits need; not for several threads at once. Library: see compile.py."""

    def __init__(self, library: Path | str):
        self._function = _function(str(library))
        self._rows = 0
        self._room(16)

    def choose(
        self, logits: np.ndarray, numbers: np.ndarray | None = None, top_k: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For logits [N, vocab_size] float32, numbers [N, 4] float64 and top_k [N] int32, C-contiguous: ids and states int32,
        largest float32, all [N], valid until the next call. Their meaning: Draws and StepResult in runtime/backends/base.py.
        Without numbers the ids are those of the largest."""
        if logits.dtype != np.float32 or not logits.flags.c_contiguous:
            logits = np.ascontiguousarray(logits, np.float32)
        rows, vocab = logits.shape
        self._room(rows)
        asked = (None, None) if numbers is None else (_address(numbers), _address(top_k))
        self._function(_address(logits), rows, vocab, *asked, *self._addresses)
        return self._ids[:rows], self._states[:rows], self._largest[:rows]

    def _room(self, rows: int) -> None:
        if rows > self._rows:
            self._rows = 2 * rows
            self._ids, self._states = (np.empty(self._rows, np.int32) for _ in range(2))
            self._largest = np.empty(self._rows, np.float32)
            self._addresses = [_address(a) for a in (self._ids, self._states, self._largest)]


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


@lru_cache
def _function(library: str):
    function = ctypes.CDLL(library).latentrt_choose_tokens
    function.argtypes, function.restype = _ARGUMENTS, None
    return function
