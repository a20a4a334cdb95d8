"""Lowerings: one file per backend. Each turns the step graph and a weight set into what that backend loads."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from export.lowering.base import Lowering, Request

_LOWERINGS = {
    "onnxruntime": "onnxruntime:OnnxruntimeLowering",
    "tensorrt": "tensorrt:TensorrtLowering",
    "tensorrt_rtx": "tensorrt:TensorrtLowering",
}


def find(request: "Request") -> "Lowering":
    """The lowering for a request. Raises BuildError for what cannot be had."""
    module, name = _LOWERINGS[request.target.backend].split(":")
    return getattr(import_module(f"export.lowering.{module}"), name)(request)
