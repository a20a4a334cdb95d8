"""words.py in ONNX's operations, for plain ONNX Runtime. Values are names, tokens are rows [T, ...], `f` collects nodes.

Numbers before packing are int64, words int32. Results have the bits of words.py but for two things. Squared errors are summed
in another order, so that of two scales that are equally good to float32's rounding the other may be taken. NaN stays NaN, of
other bits.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from latentrt.plugins.cache_formats.words import SMALLEST, word_count

if TYPE_CHECKING:
    from latentrt.plugins.onnx_function import FunctionBuilder

FLOAT, FLOAT16, BFLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
INT32, INT64 = TensorProto.INT32, TensorProto.INT64
UINT8, UINT16, UINT32 = TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32


def pack(f: "FunctionBuilder", codes: str, bits: int, elements: int) -> str:
    """int64 [T, elements] from 0 to 2^bits - 1 -> int32 [T, word_count]. bits: 2, 4, 6, 8 or 16."""
    if bits == 6:
        low, high = f("BitwiseAnd", codes, f.constant(15)), f("Div", codes, f.constant(16))
        return f("Concat", pack(f, low, 4, elements), pack(f, high, 2, elements), axis=-1)
    each, words = 32 // bits, word_count(elements, bits)
    if fill := words * each - elements:
        codes = f("Pad", codes, f.constant([0, 0, 0, fill]))
    codes = f("Reshape", codes, f.constant([0, words, each]))
    placed = f("Mul", codes, f.constant([1 << bits * k for k in range(each)]))
    return f.cast(_reduced(f, "ReduceSum", placed, words), INT32)  # from 2^31 on it is its two's complement


def _reduced(f: "FunctionBuilder", op_type: str, x: str, *shape: int) -> str:
    """Along the last axis: [T, *shape]. Of no rows ONNX Runtime (1.31) reduces nothing, and leaves the axis as it is."""
    return f("Reshape", f(op_type, x, f.constant([-1]), keepdims=0), f.constant([0, *shape]))


def part(f: "FunctionBuilder", values: str, start: int, stop: int) -> str:
    """Of the last axis."""
    return f("Slice", values, f.constant([start]), f.constant([stop]), f.constant([-1]))


def unpack(f: "FunctionBuilder", words: str, bits: int, elements: int, zero: int = 0) -> str:
    """int32 [T, word_count] -> float32 [T, elements]: the codes less `zero`."""
    if bits == 6:
        low = word_count(elements, 4)
        tops = fields(f, part(f, words, low, word_count(elements, 6)), 2, elements)
        tops = f("BitShift", tops, f.constant(4, np.uint8), direction="LEFT")
        codes = f("BitwiseOr", fields(f, part(f, words, 0, low), 4, elements), tops)
    else:
        codes = fields(f, words, bits, elements)
    return f("Sub", f.cast(codes, FLOAT), f.constant(zero, np.float32))


def fields(f: "FunctionBuilder", words: str, bits: int, elements: int) -> str:
    """int32 [T, n] -> uint8 [T, elements], of 2, 4 or 8 bits each."""
    found = f.cast(_shifted(f, words, bits), UINT8)  # a cast drops what a byte does not hold
    if bits < 8:
        found = f("BitwiseAnd", found, f.constant((1 << bits) - 1, np.uint8))
    return _in_turn(f, found, word_count(elements, bits) * 32 // bits, elements)


def _in_turn(f: "FunctionBuilder", values: str, found: int, elements: int) -> str:
    """[T, parts of a word, words], `found` in all of a row -> [T, elements]."""
    values = f("Reshape", f("Transpose", values, perm=[0, 2, 1]), f.constant([0, found]))
    return values if found == elements else part(f, values, 0, elements)


def _shifted(f: "FunctionBuilder", words: str, bits: int) -> str:
    """int32 [T, n] -> uint32 [T, 32 / bits, n]: part k in the lowest bits. A whole row by one number; in turn would be slow."""
    words = f("Unsqueeze", f("BitCast", words, to=UINT32), f.constant([1]))
    return f("BitShift", words, f.constant([[k] for k in range(0, 32, bits)], np.uint32), direction="RIGHT")


def pack_halves(f: "FunctionBuilder", values: str, elements: int) -> str:
    """float16 or bfloat16 [T, elements] -> int32 [T, ceil(elements / 2)]."""
    return pack(f, f.cast(f("BitCast", values, to=UINT16), INT64), 16, elements)


def unpack_halves(f: "FunctionBuilder", words: str, dtype: int, elements: int) -> str:
    """The way back, as float32. dtype: ONNX's."""
    halves = f("BitCast", f.cast(_shifted(f, words, 16), UINT16), to=dtype)
    return _in_turn(f, f.cast(halves, FLOAT), elements + elements % 2, elements)


def largest(f: "FunctionBuilder", x: str, groups: int) -> str:
    """The largest of |x| [T, groups, n] in each group, [T, groups, 1]; NaN where there is one, which ReduceMax may miss."""
    size = f("Abs", x)
    sums = _reduced(f, "ReduceSum", size, groups, 1)
    return f("Where", f("IsNaN", sums), sums, _reduced(f, "ReduceMax", size, groups, 1))


def quantize(f: "FunctionBuilder", x: str, groups: int, bits: int, grid: Sequence[float]) -> tuple[str, str]:
    """float32 [T, groups, n] -> codes of the same shape, int64, and float16 scales [T, groups]."""
    half, last = 1 << bits - 1, f.constant([-1])
    scales = f("Div", largest(f, x, groups), f.constant(grid, np.float32))  # [T, groups, candidates]
    scales = f.cast(f.cast(scales, FLOAT16), FLOAT)
    scales = f("Where", f("Equal", scales, f.constant(0.0, np.float32)), f.constant(SMALLEST, np.float32), scales)
    if len(grid) > 1:
        every, wide = f("Unsqueeze", x, f.constant([2])), f("Unsqueeze", scales, last)  # [T, groups, 1, n], [.., candidates, 1]
        missed = f("Sub", f("Mul", _codes(f, every, wide, half), wide), every)
        error = _reduced(f, "ReduceSum", f("Mul", missed, missed), groups, len(grid))
        error = f("Where", f("IsNaN", error), f.constant(-1.0, np.float32), error)  # larger scales come first: the first stays
        best = f("Reshape", f("ArgMin", error, axis=-1), f.constant([0, groups, 1]))
        scales = f("GatherElements", scales, best, axis=-1)
    codes = f("Add", _codes(f, x, scales, half), f.constant(half, np.float32))
    return f.cast(codes, INT64), f.cast(f("Squeeze", scales, last), FLOAT16)


def _codes(f: "FunctionBuilder", x: str, scales: str, half: int) -> str:
    """Whole numbers from -half to half - 1, as float32; 0 for NaN."""
    codes = f("Round", f("Div", x, scales))
    codes = f("Where", f("IsNaN", codes), f.constant(0.0, np.float32), codes)
    return f("Clip", codes, f.constant(-half, np.float32), f.constant(half - 1, np.float32))
