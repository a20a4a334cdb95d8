"""Triton's interpreter, made numerically right for bfloat16 and FP8.

TRITON_INTERPRET=1 (read when Triton is imported) runs kernels on the CPU in numpy. The stock interpreter of Triton 3.6
to 3.9 multiplies the raw uint16 bits of bfloat16 in tl.dot and in arithmetic, truncates float32 to bfloat16, and rounds
FP8 wrongly. It still sees no races, no misaligned access and no limit of shared memory.
"""

import os


def interpreting() -> bool:
    """Whether kernels run in the interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def repair() -> None:
    """Replaces the wrong operations of the interpreter, once; nothing if kernels are compiled."""
    if interpreting():
        _install()


def _install() -> None:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder as Builder
    from triton.runtime.interpreter import TensorHandle

    if getattr(Builder, "latentrt_repaired", False):
        return
    float8 = (tl.float8e4nv, tl.float8e5)
    stock_cast, stock_binary, stock_unary = Builder.cast_impl, Builder.binary_op, Builder.unary_op
    stock_fp_to_fp = Builder.create_fp_to_fp

    def narrow(dtype) -> bool:
        return dtype == tl.bfloat16 or dtype in float8

    def dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
        import numpy as np

        return TensorHandle(np.matmul(_wide(a), _wide(b), dtype=acc.data.dtype) + acc.data, acc.dtype.scalar)

    def convert(self, source, dtype, stock, *rest):
        before, after = source.dtype.scalar, dtype.scalar
        if narrow(before) or narrow(after):
            return TensorHandle(_rounded(_wide(source), after), after)
        return stock(self, source, dtype, *rest)

    def binary(self, left, right, op):
        if left.dtype.scalar != tl.bfloat16:
            return stock_binary(self, left, right, op)
        result = op(_wide(left), _wide(right))
        if result.dtype == bool:
            return TensorHandle(result, tl.int1)
        return TensorHandle(_rounded(result, tl.bfloat16), tl.bfloat16)

    def unary(self, argument, op):
        if argument.dtype.scalar != tl.bfloat16:
            return stock_unary(self, argument, op)
        return TensorHandle(_rounded(op(_wide(argument)), tl.bfloat16), tl.bfloat16)

    Builder.create_dot, Builder.binary_op, Builder.unary_op = dot, binary, unary
    Builder.cast_impl = lambda self, source, dtype: convert(self, source, dtype, stock_cast)
    Builder.create_fp_to_fp = lambda self, source, dtype, mode: convert(self, source, dtype, stock_fp_to_fp, mode)
    Builder.latentrt_repaired = True


def _torch_float8(dtype):
    import torch

    return {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}.get(dtype.name)


def _wide(handle):
    """The values of a handle; bfloat16 and FP8 bits become float32."""
    import numpy as np
    import torch

    dtype = handle.dtype.scalar
    if dtype.name == "bf16":
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    if _torch_float8(dtype) is not None:
        return torch.from_numpy(np.ascontiguousarray(handle.data)).view(_torch_float8(dtype)).float().numpy()
    return handle.data


def _rounded(values, dtype):
    """Values -> the interpreter's storage of `dtype`: bfloat16 to nearest even, FP8 like cvt.rn.satfinite."""
    import numpy as np
    import torch
    from triton.runtime.interpreter import _get_np_dtype

    if dtype.name == "bf16":
        values = np.ascontiguousarray(values, dtype=np.float32)
        bits = values.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(np.shape(values))
    if _torch_float8(dtype) is not None:
        limit = torch.finfo(_torch_float8(dtype)).max
        values = np.ascontiguousarray(np.clip(values.astype(np.float32), -limit, limit))
        return torch.from_numpy(values).to(_torch_float8(dtype)).view(torch.uint8).numpy().reshape(np.shape(values))
    return values.astype(_get_np_dtype(dtype))
