"""A target of a bundle, on any backend, as a runner that Polygraphy's Comparator takes: one step in, logits and caches out."""

import time
from pathlib import Path

import numpy as np
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType

from latentrt.plugins.step_graph import LOGITS, StepBatch, caches, inputs
from latentrt.runtime import backends
from latentrt.runtime.backends.base import Backend
from latentrt.runtime.bundle.reader import Bundle
from latentrt.validation.errors import ValidationError

_EXTRA_PAGES = 64  # beside the scratch page: steps for comparison are small


class BundleRunner(BaseRunner):
    """Runs single steps. Inputs are those of the step graph (docs/step-graph.md): StepBatch's, and the latent caches
    [num_pages, page_size, width] before the step. Outputs are logits [N, vocab_size] and the caches after it.

    bundle, target, backend, device: as in `latentrt.load`; options: further fields of BackendOptions. pages: most pages of a
    fed cache. Raises ValidationError for a target of several ranks, and whatever loading raises.
    """

    def __init__(
        self, bundle: str | Path, target: str | None = None, backend: str | None = None, device: str = "auto",
        pages: int = _EXTRA_PAGES, name: str | None = None, **options,
    ):  # fmt: skip
        super().__init__(name=name, prefix="latentrt-runner")
        self._bundle, self._target, self._kind = Bundle(bundle), target, backend
        chosen, entry = self._bundle.target(target)
        if entry.ranks > 1:
            found = f"target {chosen} is for {entry.ranks} ranks, whose caches are in other processes"
            raise ValidationError(f"{found}; accepted: targets of one rank")
        self.entry, self._options = entry, options | {"device": device, "cache_tokens": pages * entry.cache.page_size}
        self.backend: Backend | None = None

    def activate_impl(self) -> None:
        self.backend = backends.load(self._bundle, self._target, self._kind, **self._options)

    def deactivate_impl(self) -> None:
        self.backend.close()
        self.backend = None

    def get_input_metadata_impl(self) -> TensorMetadata:
        found, spec = TensorMetadata(), self.entry.cache
        for name, dims in inputs().items():
            found.add(name, DataType.INT32, [d if isinstance(d, int) else None for d in dims])
        for name in caches(spec.layers):
            found.add(name, DataType.from_dtype(getattr(torch, spec.dtype)), [None, spec.page_size, spec.width])
        return found

    def infer_impl(self, feed_dict: dict) -> dict:
        names = caches(self.entry.cache.layers)
        pages = [len(feed_dict[name]) for name in names]
        if max(pages) > self.backend.num_pages:
            raise ValidationError(f"caches have {max(pages)} pages, accepted: up to {self.backend.num_pages} (option pages)")
        for layer, name in enumerate(names):
            write_pages(self.backend, layer, torch.as_tensor(feed_dict[name]))
        batch = StepBatch(**{name: np.ascontiguousarray(feed_dict[name], np.int32) for name in inputs()})
        start = time.perf_counter()
        logits = np.array(self.backend.step(batch).logits())
        self.inference_time = time.perf_counter() - start
        found = {LOGITS: logits}
        for layer, updated in enumerate(names.values()):
            found[updated] = _plain(self._read(layer, pages[layer]))
        return found

    def _read(self, layer: int, pages: int) -> torch.Tensor:
        spec = self.entry.cache
        return read_pages(self.backend, layer, (pages, spec.page_size, spec.width), getattr(torch, spec.dtype))


def write_pages(backend: Backend, layer: int, pages: torch.Tensor) -> None:
    """Fills the first pages of a layer's cache with [num_pages, page_size, width]."""
    cache = backend.caches[layer]
    if isinstance(cache, np.ndarray):
        cache[: len(pages)] = pages.numpy()
    elif isinstance(cache, torch.Tensor):
        cache[: len(pages)].copy_(pages)
    else:  # an address on the GPU
        backend.device.upload(cache, pages.contiguous().view(torch.uint8).numpy())


def read_pages(backend: Backend, layer: int, shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """A copy on the host of the first pages."""
    cache = backend.caches[layer]
    if isinstance(cache, np.ndarray):
        return torch.from_numpy(cache[: shape[0]].copy())
    if isinstance(cache, torch.Tensor):
        return cache[: shape[0]].cpu().clone()
    found = torch.empty(shape, dtype=dtype)
    backend.device.download(found.view(torch.uint8).numpy(), cache, backend.runner.stream)
    backend.device.synchronize(backend.runner.stream)
    return found


def _plain(tensor: torch.Tensor) -> np.ndarray | torch.Tensor:
    """numpy where it has the type; Polygraphy takes tensors, too."""
    return tensor if tensor.dtype == torch.bfloat16 else tensor.numpy()
