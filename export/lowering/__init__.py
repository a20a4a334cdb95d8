"""Lowerings: one file per backend. Each turns the step graph and a weight set into what that backend loads."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentrt.export.lowering.base import Lowering
    from latentrt.export.options import TargetSpec

_LOWERINGS = {
    "onnxruntime": "onnxruntime.lowering:OnnxruntimeLowering",
    "tensorrt": "tensorrt.lowering:TensorrtLowering",
    "tensorrt_rtx": "tensorrt.lowering:TensorrtLowering",
}


def find(spec: "TargetSpec") -> "Lowering":
    """The lowering for a target. Raises BuildError for what cannot be had."""
    module, name = _LOWERINGS[spec.target.backend].split(":")
    return getattr(import_module(f"latentrt.export.lowering.{module}"), name)(spec)
