"""Launch plans: which kernels an op call runs, on what grids, with which arguments and workspace.

A plan follows from shapes, dtypes and the target GPU alone. Ahead-of-time compilation builds the kernels that it names,
the torch launcher and the TensorRT plugins replay it. Nothing here imports torch, Triton or a driver.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentrt.plugins.launch.nccl import Collective

ELEMENT_BYTES = {"fp32": 4, "i32": 4, "bf16": 2, "fp16": 2, "fp8e4nv": 1, "i8": 1}
ELEMENTS = {
    "float32": "fp32",
    "int32": "i32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float8_e4m3fn": "fp8e4nv",
    "int8": "i8",
}  # torch's words -> Triton's
ALIGNMENT = 256  # bytes, of every workspace buffer
POINTER_ALIGNMENT = 16  # bytes, assumed of every tensor that a kernel is given


class PlanError(ValueError):
    """No kernel can run this op call: the message says what is accepted."""


def require(op: str, condition: bool, name: str, value, accepted) -> None:
    """PlanError that names what an op's kernels do not take, unless `condition` holds."""
    if not condition:
        raise PlanError(f"{op} kernels: {name} is {value!r}, accepted: {accepted}")


@dataclass(frozen=True)
class KernelSpec:
    """One kernel to compile: a @triton.jit function of plugins/<op>/kernel.py with its constants bound.

    arguments: (name, Triton type) in launch order, types "*bf16", "i32", "fp32", ...; every pointer is 16-byte aligned.
    constexprs: (name, value); an optional pointer that is absent is a constexpr of value None.
    tensor_cores: kind of product that must run on tensor cores ("f16", "f16_sync", "fp8"), None where there is none.
    grid: the rule, in words, for whoever reads the manifest; plans hold the numbers.
    spills_because: why registers may spill here; empty where they may not.
    """

    op: str
    function: str
    arguments: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, int | str | None], ...]
    num_warps: int
    num_stages: int
    grid: str
    tensor_cores: str | None = None
    spills_because: str = ""


@dataclass(frozen=True)
class Launch:
    """One kernel launch. An argument is a number, or the name of a tensor of the op or of a workspace buffer."""

    kernel: KernelSpec
    grid: tuple[int, int, int]
    arguments: tuple[str | int | float, ...]

    def values(self, addresses: Mapping[str, int]) -> tuple[int | float, ...]:
        """The arguments as numbers, names replaced by device addresses, in the order of `kernel.arguments`."""
        return tuple(addresses[a] if isinstance(a, str) else a for a in self.arguments)

    @cached_property
    def keywords(self) -> tuple[dict[str, int | float | str | None], tuple[tuple[str, str], ...]]:
        """The arguments of a launch by keywords: what the plan fixes, constants and options included, and what is a tensor."""
        pairs = [(name, a) for (name, _), a in zip(self.kernel.arguments, self.arguments, strict=True)]
        options = dict(num_warps=self.kernel.num_warps, num_stages=self.kernel.num_stages)
        fixed = {name: a for name, a in pairs if not isinstance(a, str)} | dict(self.kernel.constexprs) | options
        return fixed, tuple((name, a) for name, a in pairs if isinstance(a, str))


@dataclass(frozen=True)
class Buffer:
    """A part of the workspace: `dtype` in Triton's words, `offset` and `size` in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return prod(self.shape) * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True)
class Plan:
    """What one op call runs, in stream order. The workspace needs no initialization and holds nothing between calls."""

    launches: "tuple[Launch | Collective, ...]"  # a collective is alone
    workspace: tuple[Buffer, ...] = ()

    @property
    def workspace_bytes(self) -> int:
        return max((b.offset + b.size for b in self.workspace), default=0)

    @property
    def kernels(self) -> tuple[KernelSpec, ...]:
        return tuple(launch.kernel for launch in self.launches if isinstance(launch, Launch))

    def addresses(self, tensors: Mapping[str, int], workspace: int) -> dict[str, int]:
        """Device addresses by name: the op's tensors, and the buffers of a workspace that begins at `workspace`."""
        return dict(tensors) | {b.name: workspace + b.offset for b in self.workspace}


def place(*buffers: tuple[str, str, tuple[int, ...]]) -> tuple[Buffer, ...]:
    """Lays (name, dtype, shape) out one after another, each at a multiple of 256 bytes."""
    placed, offset = [], 0
    for name, dtype, shape in buffers:
        placed.append(Buffer(name, dtype, shape, offset))
        offset += -(-placed[-1].size // ALIGNMENT) * ALIGNMENT
    return tuple(placed)


def bind(kernel: KernelSpec, grid: tuple[int, ...], /, **arguments: str | int | float) -> Launch:
    """A launch of `kernel`; `arguments` by name, exactly those of its signature. Missing axes of `grid` are 1."""
    names = [name for name, _ in kernel.arguments]
    if set(names) != set(arguments):
        raise PlanError(f"{kernel.function} takes {names}, given {list(arguments)}")
    return Launch(kernel, (*grid, 1, 1, 1)[:3], tuple(arguments[n] for n in names))


def cdiv(a: int, b: int) -> int:
    """Division rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()
