"""Backends: one file per way to run a step graph. The table holds names, so that nothing is imported before it is used."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.backends.base import Backend
    from runtime.bundle import Bundle

_BACKENDS = {
    "onnxruntime": ("onnxruntime", "OnnxRuntimeBackend"),
    "tensorrt": ("tensorrt", "TensorRtBackend"),
    "tensorrt_rtx": ("tensorrt", "TensorRtBackend"),
    "torch": ("torch", "TorchBackend"),
}


def load(bundle: "Bundle", target_name: str | None = None, backend: str | None = None, **options) -> "Backend":
    """The backend that runs a target of a bundle. Raises BundleError if this version or machine cannot.

    backend: the target's own by default; "torch" interprets any target's ONNX graph.
    """
    from runtime.bundle import BundleError

    name, target = bundle.target(target_name)
    chosen = backend or target.backend
    if chosen not in _BACKENDS:
        raise BundleError(f"target {name}: no backend {chosen!r}, accepted: {', '.join(_BACKENDS)}")
    if chosen not in (target.backend, "torch"):
        raise BundleError(f"target {name} is for backend {target.backend}, accepted: {target.backend}, torch")
    file, cls = _BACKENDS[chosen]
    try:
        module = import_module(f"runtime.backends.{file}")
    except ModuleNotFoundError as error:
        message = f"target {name} needs backend {chosen}, but {error.name} is not installed; see requirements*.txt"
        raise BundleError(message) from None
    return getattr(module, cls)(bundle, name, target, **options)
