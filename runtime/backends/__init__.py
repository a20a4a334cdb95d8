"""Backends: one file per way to run a step graph. The table holds names, so that nothing is imported before it is used."""

from importlib import import_module
from typing import TYPE_CHECKING

from runtime.bundle import Bundle, BundleError

if TYPE_CHECKING:
    from runtime.backends.base import Backend

_BACKENDS = {"onnxruntime": "OnnxRuntimeBackend"}


def load(bundle: Bundle, target_name: str | None = None, **options) -> "Backend":
    """The backend that runs a target of a bundle. Raises BundleError if this version or machine cannot."""
    name, target = bundle.target(target_name)
    if target.backend not in _BACKENDS:
        raise BundleError(f"target {name} needs backend {target.backend}, this version has: {', '.join(_BACKENDS)}")
    module = import_module(f"runtime.backends.{target.backend}")
    return getattr(module, _BACKENDS[target.backend])(bundle, name, target, **options)
