"""The custom ops, one row each. Their parts are imported when they are asked for."""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentrt.plugins.contract import OpContract
    from latentrt.plugins.trt_base import PluginOp

NAMES = ("mla_attention", "mla_prefill", "moe_route", "moe_experts")
COLLECTIVES = ("all_gather", "reduce_scatter")  # which join ranks: no kernels of ours


@cache  # a launch asks for it
def part(op: str, name: str) -> ModuleType:
    """plugins/<op>/<name>.py: op (the contract), reference, kernel, plan, ort, trt."""
    return import_module(f"latentrt.plugins.{op}.{name}")


@cache
def contracts() -> dict[str, "OpContract"]:
    """Contracts by the op's type in ONNX graphs. Registers the torch ops and the ONNX schemas."""
    found = [part(name, "op").CONTRACT for name in (*NAMES, *COLLECTIVES)]
    return {contract.onnx_type: contract for contract in found}


@cache
def plugins() -> dict[str, "PluginOp"]:
    """TensorRT plugins by the op's type in ONNX graphs."""
    found = [part(name, "trt").OP for name in (*NAMES, *COLLECTIVES)]
    return {op.contract.onnx_type: op for op in found}
