"""Tokens drawn through TensorRT's runtime: host memory in the GPU's place, the kernel in Triton's interpreter."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from latentrt.plugins.launch import interpreter
from latentrt.runtime.backends.base import StepResult
from latentrt.runtime.backends.tensorrt.drawing import TokenDrawer, kernel
from latentrt.runtime.backends.tensorrt.runner import EngineResult
from latentrt.runtime.engine import sampler
from latentrt.runtime.engine.sampler import Sampler
from latentrt.runtime.sampling_params import SamplingParams

if not interpreter.interpreting():
    pytest.skip("kernels run in Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

ROWS, VOCAB, STREAM = 6, 300, 7
DTYPES = {"*fp32": (ctypes.c_float, torch.float32), "*fp64": (ctypes.c_double, torch.float64),
          "*i32": (ctypes.c_int32, torch.int32)}  # fmt: skip


class HostDevice:
    """Memory of the host by address."""

    def __init__(self):
        self.memory, self.log = [], []

    def allocate(self, size: int) -> int:
        self.memory.append(np.full(size, 0xFF, np.uint8))
        return self.memory[-1].ctypes.data

    def pinned(self, elements: int) -> np.ndarray:
        return np.full(elements, -1, np.int32)

    def upload_async(self, address, array, stream) -> None:
        self.log.append(("upload", array.nbytes, stream))
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, array, address, stream) -> None:
        self.log.append(("download", array.nbytes, stream))
        ctypes.memmove(array.ctypes.data, address, array.nbytes)


class Interpreted:
    """A launcher that runs a plan's kernel on host memory; it has what `prepare` was told of."""

    def __init__(self):
        self.prepared = []

    def prepare(self, kernels) -> None:
        self.prepared += kernels

    def ready(self, plan, names):
        from latentrt.plugins.sampling.kernel import sample

        (launch,) = plan.launches
        assert launch.kernel in self.prepared
        rows = launch.grid[0]
        sizes = {"logits": rows * VOCAB, "numbers": rows * 4}

        def call(addresses, workspace, stream):
            tensors = {}
            for (name, kind), where in zip(launch.kernel.arguments, launch.arguments, strict=True):
                word, dtype = DTYPES[kind]
                memory = (word * sizes.get(name, rows)).from_address(addresses[list(names).index(where)])
                tensors[name] = torch.frombuffer(memory, dtype=dtype)
            sample[launch.grid](**tensors, **dict(launch.kernel.constexprs))

        return call


def test_every_row_gets_the_hosts_token_and_few_bytes_move():
    device, launcher, rng = HostDevice(), Interpreted(), np.random.default_rng(0)
    address = device.allocate(ROWS * VOCAB * 4)
    on_gpu = device.memory[0].view(np.float32).reshape(ROWS, VOCAB)
    drawer = TokenDrawer(device, launcher, address, VOCAB, ROWS)
    assert launcher.prepared == [kernel(VOCAB)]
    params = [SamplingParams(temperature=0.7, top_p=0.9), SamplingParams(), SamplingParams(temperature=1.0, top_k=5),
              SamplingParams(temperature=2.0, min_p=0.1), SamplingParams(temperature=1.0), SamplingParams()]  # fmt: skip
    here, there = ([Sampler(p, []) for p in params] for _ in range(2))
    for sampled in (here, there):
        for n, one in enumerate(sampled):
            one._random = np.random.default_rng(n)
    for count in (ROWS, 2, ROWS, 5):
        on_gpu[:] = rng.normal(size=(ROWS, VOCAB)) * 3
        runner = SimpleNamespace(drawer=drawer, stream=STREAM)
        device.log.clear()
        found = sampler.choose(EngineResult(runner, 0, count), there[:count])
        assert found == sampler.choose(StepResult(on_gpu[:count].copy()), here[:count])
        assert device.log == [("upload", count * 36, STREAM), ("download", count * 12, STREAM)]


def test_the_largest_are_found_there():
    device = HostDevice()
    address = device.allocate(ROWS * VOCAB * 4)
    logits = device.memory[0].view(np.float32).reshape(ROWS, VOCAB)
    logits[:] = np.random.default_rng(1).integers(0, 9, (ROWS, VOCAB))  # with many equal ones
    runner = SimpleNamespace(drawer=TokenDrawer(device, Interpreted(), address, VOCAB, ROWS), stream=STREAM)
    for ours, theirs in zip(EngineResult(runner, 0, 4).greedy(), StepResult(logits[:4]).greedy(), strict=True):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
