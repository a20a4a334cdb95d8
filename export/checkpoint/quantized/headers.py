"""What the formats check about tensors: from headers before anything is read, and about scales once they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NoReturn

from latentrt.export.checkpoint.base import StoredTensor
from latentrt.export.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = ("F32", "BF16", "F16")
SAVE_AGAIN = "start from the unquantized checkpoint, or save this one again in a format that docs/checkpoints.md lists"
# Scales of activations and of the KV cache: they say nothing about weights.
NO_ROLE = tuple(
    f".{name}" for name in (
        "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point", "k_scale", "v_scale",
        "q_scale", "kv_scale", "prob_scale", "prob_output_scale", "k_zero_point", "v_zero_point", "activation_scale",
    )
)  # fmt: skip


def without_role(tensors: Iterable[str]) -> set[str]:
    return {name for name in tensors if name.endswith(NO_ROLE)}


def modules(tensors: Mapping[str, StoredTensor], suffix: str) -> list[str]:
    """Module names (with what goes before the dot) of all tensors that are called <module>.<suffix>."""
    return [name.removesuffix(f".{suffix}") for name in tensors if name.endswith(f".{suffix}")]


def refuse(name: str, found: object, accepted: str, help: str = SAVE_AGAIN) -> NoReturn:
    raise CheckpointError(f"tensor {name}: {found}; accepted: {accepted}; {help}")


def check(
    tensors: Mapping[str, StoredTensor], name: str, dtypes: Iterable[str], *shapes: tuple[int, ...], help: str = SAVE_AGAIN
) -> StoredTensor:
    """The header of `name`, which must be there with one of `dtypes` and, where given, one of `shapes`."""
    if name not in tensors:
        raise CheckpointError(
            f"tensor {name} is missing: the weight beside it is quantized and cannot be read without; download it again"
        )
    stored = tensors[name]
    if stored.dtype not in dtypes:
        refuse(f"{name} of {stored.file.name}", f"dtype {stored.dtype}", ", ".join(dtypes), help)
    if shapes and stored.shape not in shapes:
        accepted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        refuse(f"{name} of {stored.file.name}", f"shape {list(stored.shape)}", accepted, help)
    return stored


def matrix(tensors: Mapping[str, StoredTensor], name: str, dtypes: Iterable[str]) -> tuple[int, int]:
    """The shape of `name`, which must be two-dimensional and not empty."""
    stored = check(tensors, name, dtypes)
    if len(stored.shape) != 2 or 0 in stored.shape:
        refuse(f"{name} of {stored.file.name}", f"shape {list(stored.shape)}", "two dimensions, not empty")
    return stored.shape[0], stored.shape[1]


def finite(name: str, scale: Tensor) -> Tensor:
    """`scale` in float32, all elements finite."""
    wide = scale.float()
    bad = ~wide.isfinite()
    if bad.any():
        index = bad.nonzero()[0].tolist()
        raise CheckpointError(
            f"tensor {name} is not finite at {index} ({wide[tuple(index)].item()}), {int(bad.sum())} such elements in all; "
            "accepted: finite scales; the file is damaged, download it again"
        )
    return wide


def refuse_config(field: str, found: object, accepted: str, help: str = SAVE_AGAIN) -> NoReturn:
    raise CheckpointError(f"quantization config: {field} is {found!r}; accepted: {accepted}; {help}")


def indices(name: str, index: Tensor, count: int) -> Tensor:
    """`index` as int64, all from 0 to count - 1."""
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= count:
        refuse(name, f"values from {low} to {high}", f"0 to {count - 1}, the groups that have scales", "download it again")
    return index.long()


def groups_in(tensors: Mapping[str, StoredTensor], scales: str, cols: int, out: int, group_size: object) -> int:
    """Inputs per group, where `scales` is [groups, out]: as the config says (-1: all), else what the shape says."""
    groups, _ = matrix(tensors, scales, FLOATS)
    if group_size is None:
        group_size = cols // groups if cols % groups == 0 else 0
    if type(group_size) is not int or group_size < -1 or group_size == 0:
        refuse_config("group_size", group_size, "a positive number, or -1 for one group")
    size = min(cols, group_size) if group_size > 0 else cols
    check(tensors, scales, FLOATS, (-(-cols // size), out))
    return size
