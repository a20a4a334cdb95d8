"""Tokens chosen on the GPU, from logits that an engine has left there: the kernel of plugins/sampling."""

from itertools import pairwise

import numpy as np

from latentrt.plugins.launch.plan import KernelSpec
from latentrt.plugins.sampling.plan import TENSORS, Sampling, kernels, plan
from latentrt.runtime.backends.base import Draws
from latentrt.runtime.backends.tensorrt.device import Device

_WORDS = {"numbers": 8, "top_k": 1, "ids": 1, "states": 1, "largest": 1}  # int32 of a row, in the order in memory
_ALL, _ASKED = sum(_WORDS.values()), _WORDS["numbers"] + _WORDS["top_k"]  # what is asked goes to the GPU, the rest comes back


def kernel(vocab_size: int) -> KernelSpec:
    """The kernel that `TokenDrawer` asks its launcher for."""
    return kernels(Sampling(vocab_size))[0]


class TokenDrawer:
    """Draws for up to `rows` rows of logits [rows, vocab_size] at an address; nothing is allocated later."""

    def __init__(self, device: Device, launcher, logits: int, vocab_size: int, rows: int):
        self._device, self._launcher, self._logits, self._config = device, launcher, logits, Sampling(vocab_size)
        self._host, self._memory = device.pinned(rows * _ALL), device.allocate(rows * _ALL * 4)
        self._plans = {}
        launcher.prepare(kernels(self._config))

    def draw(self, draws: Draws, stream) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See StepResult.draw. Waits for what `stream` holds."""
        count = len(draws.top_k)
        numbers, top_k, *found = self._views(count)
        numbers.view(np.float64)[:] = draws.numbers.reshape(-1)
        top_k[:] = draws.top_k
        self._device.upload_async(self._memory, self._host[: count * _ASKED], stream)
        if count not in self._plans:
            self._plans[count] = self._launcher.ready(plan(self._config, count), TENSORS)
        self._plans[count]([self._logits, *self._addresses(count)], 0, int(stream))
        self._device.download(self._host[count * _ASKED : count * _ALL], self._memory + 4 * count * _ASKED, stream)
        ids, states, largest = found
        return ids.copy(), states.copy(), largest.view(np.float32).copy()

    def _views(self, count: int) -> list[np.ndarray]:
        ends = np.cumsum([0, *_WORDS.values()]) * count
        return [self._host[start:end] for start, end in pairwise(ends)]

    def _addresses(self, count: int) -> list[int]:
        return [self._memory + 4 * int(start) for start in np.cumsum([0, *_WORDS.values()])[:-1] * count]
