"""Lowerings: one file per backend. Each turns the step graph and a weight set into what that backend loads."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentrt.export.lowering.base import Lowering
    from latentrt.export.options import TargetSpec

_LOWERINGS = {
    "onnxruntime": ("onnxruntime", "OnnxruntimeLowering"),
    "tensorrt": ("tensorrt", "TensorrtLowering"),
    "tensorrt_rtx": ("tensorrt", "TensorrtLowering"),
    "torch": ("torch", "TorchLowering"),
}


def check(spec: "TargetSpec") -> None:
    """Raises BuildError for what cannot be had, as `find` does, without the imports that take seconds."""
    folder, _ = _LOWERINGS[spec.target.backend]
    import_module(f"latentrt.export.lowering.{folder}.choices").resolve(spec)


def find(spec: "TargetSpec") -> "Lowering":
    """The lowering for a target. Raises BuildError for what cannot be had."""
    folder, name = _LOWERINGS[spec.target.backend]
    return getattr(import_module(f"latentrt.export.lowering.{folder}.lowering"), name)(spec)
