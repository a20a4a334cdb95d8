"""Backends: one row per way to run a step graph. The table holds names, so that nothing is imported before it is used."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentrt.runtime.backends.base import Backend, BackendOptions
    from latentrt.runtime.bundle.reader import Bundle
    from latentrt.runtime.ranks.joining import Joining


@dataclass(frozen=True)
class _Row:
    module: str
    cls: str
    devices: tuple[str, ...]  # kinds that it runs on


_BACKENDS = {
    "onnxruntime": _Row("onnxruntime", "OnnxRuntimeBackend", ("cpu",)),
    "tensorrt": _Row("tensorrt.backend", "TensorRtBackend", ("cuda",)),
    "tensorrt_rtx": _Row("tensorrt.backend", "TensorRtBackend", ("cuda",)),
    "torch": _Row("torch.backend", "TorchBackend", ("cpu", "cuda")),
}
_BATCH_INVARIANT = ("onnxruntime",)
INTERPRETER = "torch"  # runs the ONNX graph of any target


def check(bundle: "Bundle", target_name: str | None, backend: str | None, options: "BackendOptions") -> str:
    """The backend's name. BundleError if it is not the target's, RequestError for a device that it does not run on."""
    from latentrt.runtime.errors import BundleError, RequestError

    name, target = bundle.target(target_name)
    chosen = backend or target.backend
    if chosen not in _BACKENDS:
        raise BundleError(f"target {name}: no backend {chosen!r}, accepted: {', '.join(_BACKENDS)}")
    if chosen not in (target.backend, INTERPRETER):
        raise BundleError(f"target {name} is for backend {target.backend}, accepted: {target.backend}, {INTERPRETER}")
    kinds = _BACKENDS[chosen].devices
    if options.device != "auto" and options.device.split(":")[0] not in kinds:
        runs_on = "a GPU" if kinds == ("cuda",) else "the CPU"
        found = f"device is {options.device!r}, but target {name} runs on {runs_on} ({chosen})"
        raise RequestError(f"{found}; choose backend {INTERPRETER}, too")
    if options.batch_invariant and chosen not in _BATCH_INVARIANT:
        found = f"batch_invariant is set, but target {name} runs on {chosen}, for which it is not proven"
        raise RequestError(f"{found}; accepted: {', '.join(_BATCH_INVARIANT)} (target cpu); leave it out")
    return chosen


def load(bundle: "Bundle", target_name: str | None = None, backend: str | None = None, **options) -> "Backend":
    """The backend that runs a target of a bundle. Raises BundleError if this version or machine cannot.

    backend: the target's own by default; "torch" interprets any target's ONNX graph. options: fields of BackendOptions.
    """
    from latentrt.runtime.backends.base import BackendOptions

    asked = BackendOptions(**options)
    kind = check(bundle, target_name, backend, asked)
    name, target = bundle.target(target_name)
    if target.ranks > 1:
        from latentrt.runtime.ranks.backend import RanksBackend

        return RanksBackend(bundle, name, target, asked, kind)
    return _class(kind, name)(bundle, name, target, asked)


def load_rank(bundle: "Bundle", name: str, kind: str, options: "BackendOptions", joining: "Joining") -> "Backend":
    """One rank's part of a target, in a process that has joined the others."""
    return _class(kind, name)(bundle, name, bundle.target(name)[1], options, *joining.given)


def _class(kind: str, target: str) -> type:
    from latentrt.runtime.errors import BundleError

    row = _BACKENDS[kind]
    try:
        return getattr(import_module(f"latentrt.runtime.backends.{row.module}"), row.cls)
    except ModuleNotFoundError as error:
        needs = f"target {target} needs backend {kind}, but {error.name} is not installed"
        raise BundleError(f"{needs}; see requirements*.txt") from None
