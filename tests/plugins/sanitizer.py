"""Triton's interpreter with eyes: every lane's address, races between programs, memory that nobody wrote, any order.

    with Sanitizer(seed) as found:
        launch()
    assert found.faults == []

Inside, programs of a launch run in an order that `seed` shuffles. A lane may touch its launch's tensors only. Two programs of
one launch must not write one byte, nor one read what another writes: on a GPU they run at once. What torch.empty gave is not
read before it was written.
"""

import inspect
import random

import numpy as np
import torch
from triton.runtime import interpreter

NOBODY, SEVERAL = -1, -2


class Sanitizer:
    """A context manager; see above. `faults`: what was found, in words, each kind once a launch."""

    def __init__(self, seed: int):
        self.faults: list[str] = []
        self._order = random.Random(seed)
        self._written: dict[int, np.ndarray] = {}  # of memory that torch.empty gave, by its address: which bytes were written
        self._kept: list[torch.Tensor] = []  # so that no address is given twice
        self._said: set[tuple] = set()

    def __enter__(self) -> "Sanitizer":
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        self._stock = [(builder, "create_masked_load"), (builder, "create_masked_store"), (executor, "__call__"),
                       (torch, "empty"), (torch, "empty_like")]  # fmt: skip
        self._stock = [(owner, name, getattr(owner, name)) for owner, name in self._stock]
        (*_, load), (*_, store), _, (*_, empty), (*_, empty_like) = self._stock
        watch = self

        def watched_load(self, pointers, mask, other, *rest):
            dtype = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty()))
            watch._touch(pointers.data, mask.data, dtype.itemsize, False)
            return load(self, pointers, mask, other, *rest)

        def watched_store(self, pointers, value, mask, *rest):
            watch._touch(pointers.data, mask.data, value.data.dtype.itemsize, True)
            return store(self, pointers, value, mask, *rest)

        def launch(self, *arguments, **named):
            return watch._launch(self, arguments, named)

        new = (watched_load, watched_store, launch, self._unwritten(empty), self._unwritten(empty_like))
        for (owner, name, _), replacement in zip(self._stock, new, strict=True):
            setattr(owner, name, replacement)
        return self

    def __exit__(self, *error) -> None:
        for owner, name, stock in self._stock:
            setattr(owner, name, stock)

    def _unwritten(self, make):
        def made(*arguments, **named):
            tensor = make(*arguments, **named)
            storage = tensor.untyped_storage()
            self._written[storage.data_ptr()] = np.zeros(storage.nbytes(), bool)
            self._kept.append(tensor)
            return tensor

        return made

    def _launch(self, executor, arguments: tuple, named: dict) -> None:
        signature = inspect.getfullargspec(executor.fn)
        named = {k: v for k, v in named.items() if k in signature.args or k in signature.kwonlyargs}
        values = inspect.getcallargs(executor.fn, *arguments, **named)
        tensors = {n: t for n, t in values.items() if isinstance(t, torch.Tensor) and t.numel()}
        self._name, self._said = executor.fn.__name__, set()
        self._extents = sorted((_extent(n, t) for n, t in tensors.items()), key=lambda e: e[2] - e[1])
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}
        self._maps = {at: np.full((2, size), NOBODY, np.int32) for at, size in storages.items()}  # who wrote, who read
        scope = interpreter._patch_lang(executor.fn)
        try:
            given = {n: v if n in executor.constexprs else interpreter._implicit_cvt(v) for n, v in values.items()}
            grid = executor.grid(given) if callable(executor.grid) else executor.grid
            grid = (*grid, 1, 1)[:3]
            interpreter.interpreter_builder.set_grid_dim(*grid)
            programs = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
            self._order.shuffle(programs)
            for self._program, place in enumerate(programs):
                interpreter.interpreter_builder.set_grid_idx(*place)
                executor.fn(**given)
        finally:
            scope.restore()

    def _touch(self, pointers: np.ndarray, mask: np.ndarray, size: int, writes: bool) -> None:
        """Looks at the addresses of a load or a store, `size` bytes each."""
        at = pointers.astype(np.int64).reshape(-1)[np.broadcast_to(mask, pointers.shape).reshape(-1)]
        if writes and len(np.unique(at)) < len(at):
            self._say("two lanes of a store write one address")
        if (at % size).any():
            self._say("an address that is not aligned to its type")
        left = np.ones(len(at), bool)
        for name, low, high, storage in self._extents:
            inside = left & (at >= low) & (at + size <= high)
            left &= ~inside
            if inside.any():
                self._claim(name, storage, (at[inside] - storage)[:, None] + np.arange(size), writes)
        if left.any():
            self._say(f"{'store' if writes else 'load'} outside of all tensors")
            raise IndexError(self.faults[-1])

    def _claim(self, name: str, storage: int, places: np.ndarray, writes: bool) -> None:
        (writer, reader), me = self._maps[storage], self._program
        foreign = (writer[places] != NOBODY) & (writer[places] != me)
        written = self._written.get(storage)
        if writes:
            if foreign.any():
                self._say(f"two programs write {name}")
            if ((reader[places] != NOBODY) & (reader[places] != me)).any():
                self._say(f"a program writes what another reads, {name}")
            writer[places] = me
            if written is not None:
                written[places] = True
            return
        if foreign.any():
            self._say(f"a program reads what another writes, {name}")
        if written is not None and not written[places].all():
            self._say(f"{name} is read before it was written")
        reader[places] = np.where((reader[places] == NOBODY) | (reader[places] == me), me, SEVERAL)

    def _say(self, what: str) -> None:
        if (what,) not in self._said:
            self._said.add((what,))
            self.faults.append(f"{self._name}: {what}")


def _extent(name: str, tensor: torch.Tensor) -> tuple[str, int, int, int]:
    """Name, first and last address, and the address of its storage."""
    elements = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    low = tensor.data_ptr()
    return name, low, low + elements * tensor.element_size(), tensor.untyped_storage().data_ptr()
