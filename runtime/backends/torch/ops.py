"""ONNX ops as torch calls: only the ops that step graphs contain. `TABLE[op_type](node)` makes a callable, once a node.

A callable takes the node's tensors and returns its output, or a tuple of outputs. Arguments that say shapes and axes
(`HOST_ARGUMENTS`) come as lists of integers: constants are read when the graph is compiled, the rest at run time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float16,
    11: torch.float64, 16: torch.bfloat16, 17: torch.float8_e4m3fn,
}  # fmt: skip
HOST_ARGUMENTS = {
    "Reshape": (1,), "Expand": (1,), "Slice": (1, 2, 3, 4), "Split": (1,), "Squeeze": (1,), "Unsqueeze": (1,),
    "ReduceMax": (1,), "ReduceSum": (1,), "ConstantOfShape": (0,),
}  # fmt: skip
_FLOAT8_MAX = 448.0


@dataclass(frozen=True)
class Node:
    """One node of a graph: names of its inputs ("" where an optional one is absent) and outputs, and its attributes."""

    op_type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict = field(default_factory=dict)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """ONNX Cast: to FP8 it saturates."""
    if dtype == torch.float8_e4m3fn:
        x = x.float().clamp(-_FLOAT8_MAX, _FLOAT8_MAX)
    return x.to(dtype)


def _cast(node: Node) -> Callable:
    dtype = DTYPES[node.attributes["to"]]
    return lambda x: cast(x, dtype)


def _dist_collective(node: Node) -> Callable:
    """TensorRT's collectives, of which step graphs have two."""
    from latentrt.plugins.all_gather.reference import all_gather
    from latentrt.plugins.reduce_scatter.reference import reduce_scatter

    function = {"all_gather": all_gather, "reduce_scatter": reduce_scatter}[node.attributes["collective_operation"]]
    return lambda x: function(x, node.attributes["nb_rank"])


def _gemm(node: Node) -> Callable:
    a = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0} | node.attributes
    if (a["alpha"], a["beta"], a["transA"]) != (1.0, 1.0, 0):
        raise NotImplementedError(f"Gemm {node.name} with {a}; accepted: alpha 1, beta 1, transA 0")
    if a["transB"]:
        return F.linear
    return lambda x, w, bias=None: x @ w if bias is None else torch.addmm(bias, x, w)


def _reshape(node: Node) -> Callable:
    def reshape(x: Tensor, shape: list[int]) -> Tensor:
        if not node.attributes.get("allowzero", 0):
            shape = [x.shape[i] if s == 0 else s for i, s in enumerate(shape)]
        return x.reshape(shape)

    return reshape


def _slice(node: Node) -> Callable:
    def cut(x: Tensor, starts, ends, axes=None, steps=None) -> Tensor:
        index = [slice(None)] * x.dim()
        axes = axes if axes is not None else range(len(starts))
        for axis, start, end, step in zip(axes, starts, ends, steps or [1] * len(starts), strict=True):
            index[axis] = slice(start, end, step)
        return x[tuple(index)]

    return cut


def _split(node: Node) -> Callable:
    axis, count = node.attributes.get("axis", 0), len(node.outputs)

    def split(x: Tensor, sizes: list[int] | None = None):
        parts = x.split(sizes if sizes is not None else -(-x.shape[axis] // count), axis)
        return parts if count > 1 else parts[0]

    return split


def _unsqueeze(node: Node) -> Callable:
    def unsqueeze(x: Tensor, axes: list[int]) -> Tensor:
        rank = x.dim() + len(axes)
        for axis in sorted(a % rank for a in axes):
            x = x.unsqueeze(axis)
        return x

    return unsqueeze


def _gather(node: Node) -> Callable:
    axis = node.attributes.get("axis", 0)

    def gather(x: Tensor, indices: Tensor) -> Tensor:
        if indices.dim() == 1:
            return x.index_select(axis, indices)
        return x.index_select(axis, indices.reshape(-1)).reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])

    return gather


def _rms_norm(node: Node) -> Callable:
    if node.attributes.get("axis", -1) != -1:
        raise NotImplementedError(f"RMSNormalization {node.name} over axis {node.attributes['axis']}; accepted: -1")
    eps = node.attributes.get("epsilon", 1e-5)
    return lambda x, weight: F.rms_norm(x, (x.shape[-1],), weight, eps)


def _spread(scale: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """A scale [] or [1], [x.shape[axis]], or of blocks along `axis`, in a shape that broadcasts over x."""
    if scale.numel() == 1:
        return scale.reshape(())
    if block:
        return scale.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return scale.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


def _quantize(node: Node) -> Callable:
    axis, block = node.attributes.get("axis", 1), node.attributes.get("block_size", 0)
    output = node.attributes.get("output_dtype", 0)

    def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        dtype = DTYPES[output] if output else torch.uint8 if zero_point is None else zero_point.dtype
        if dtype != torch.float8_e4m3fn:
            raise NotImplementedError(f"QuantizeLinear {node.name} to {dtype}; accepted: float8_e4m3fn")
        return cast(x.float() / _spread(scale, x, axis, block).float(), dtype)

    return quantize


def _dequantize(node: Node) -> Callable:
    axis, block = node.attributes.get("axis", 1), node.attributes.get("block_size", 0)
    output = node.attributes.get("output_dtype", 0)

    def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        dtype = DTYPES[output] if output else scale.dtype
        return (q.float() * _spread(scale, q, axis, block).float()).to(dtype)

    return dequantize


def _concat(node: Node) -> Callable:
    axis = node.attributes["axis"]
    return lambda *xs: torch.cat(xs, axis)


def _transpose(node: Node) -> Callable:
    perm = tuple(node.attributes["perm"])
    return lambda x: x.permute(perm)


def _reduce(function: Callable) -> Callable:
    def make(node: Node) -> Callable:
        keep = bool(node.attributes.get("keepdims", 1))
        return lambda x, axes=None: function(x, axes if axes is not None else list(range(x.dim())), keep)

    return make


def _shape(node: Node) -> Callable:
    start, end = node.attributes.get("start", 0), node.attributes.get("end")
    return lambda x: torch.tensor(x.shape[start:end], dtype=torch.int64)


def _clip(node: Node) -> Callable:
    return lambda x, low=None, high=None: torch.clamp(x, low, high)


def _constant_of_shape(node: Node) -> Callable:
    value = node.attributes.get("value")
    fill = torch.zeros(1) if value is None else value
    return lambda shape: fill.expand(shape).clone()


def _plain(function: Callable) -> Callable:
    return lambda node: function


TABLE: dict[str, Callable[[Node], Callable]] = {
    "Abs": _plain(torch.abs),
    "Add": _plain(torch.add),
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Cos": _plain(torch.cos),
    "DequantizeLinear": _dequantize,
    "DistCollective": _dist_collective,
    "Div": _plain(torch.div),
    "Expand": _plain(lambda x, shape: x.expand(torch.broadcast_shapes(x.shape, shape))),
    "Gather": _gather,
    "Gemm": _gemm,
    "Identity": _plain(lambda x: x),
    "MatMul": _plain(torch.matmul),
    "Max": _plain(torch.maximum),
    "Min": _plain(torch.minimum),
    "Mul": _plain(torch.mul),
    "QuantizeLinear": _quantize,
    "RMSNormalization": _rms_norm,
    "Reciprocal": _plain(torch.reciprocal),
    "ReduceMax": _reduce(torch.amax),
    "ReduceSum": _reduce(torch.sum),
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": _plain(torch.sigmoid),
    "Sin": _plain(torch.sin),
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _plain(lambda x, axes=None: x.squeeze(axes) if axes is not None else x.squeeze()),
    "Sub": _plain(torch.sub),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
