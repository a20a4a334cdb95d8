"""Quantized checkpoints for other engines: vLLM, SGLang, TensorRT-LLM, transformers. One row a format; files by `write.py`."""

from importlib import import_module
from typing import TYPE_CHECKING

from latentrt.export.errors import BuildError

if TYPE_CHECKING:
    from latentrt.export.publishing.base import Published

FORMATS = {  # name -> (module, class)
    "fp8-block": ("fp8", "Fp8Blocks"),
    "modelopt-fp8": ("modelopt", "Fp8Channels"),
    "modelopt-fp8-tensor": ("modelopt", "Fp8Tensors"),
    "modelopt-fp8-block": ("modelopt", "Fp8WeightBlocks"),
    "modelopt-nvfp4": ("modelopt", "Nvfp4Weights"),
}


def check(name: str) -> None:
    """BuildError lists the formats."""
    if name not in FORMATS:
        raise BuildError(f"format is {name!r}, accepted: {', '.join(FORMATS)}")


def find(name: str) -> "Published":
    """The format called `name`."""
    check(name)
    module, kind = FORMATS[name]
    return getattr(import_module(f"latentrt.export.publishing.{module}"), kind)()
