"""Builds for tests: with options by name, and of graphs that are traced once a run."""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch

from latentrt import builder
from latentrt.export import graph
from latentrt.export.options import BuildOptions


def build(checkpoint: Path, out: Path, *options, **named) -> dict:
    """`builder.build` with BuildOptions(*options, **named): target, precision, accuracy, cache_format, ..."""
    return builder.build(checkpoint, out, BuildOptions(*options, **named))


@contextmanager
def locked(path: Path):
    """One process of pytest-xdist at a time."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def once(first: Path, make: Callable[[Path], object], out: Path) -> Path:
    """`out`, this process's own copy of the folder `first`, which `make` makes once a run."""
    with locked(first.with_name(f"{first.name}.lock")):
        if not first.exists():
            make(first.with_name(f"{first.name}.new"))
            first.with_name(f"{first.name}.new").rename(first)
    return Path(shutil.copytree(first, out))


class Traces:
    """`export.graph.build`, remembered in a folder of all processes: the same arguments are traced once a run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._build_forms = graph.build_forms  # the real one: `remembered` replaces it

    def __call__(self, config, dtype=torch.float32, cache_format="float32", page_size=64, form="absorbed", ranks=1) -> ir.Model:
        """A fresh model."""
        key = json.dumps([config.model_dump(), str(dtype), cache_format, page_size, form, ranks], sort_keys=True)
        file = self.folder / f"graph.{hashlib.sha256(key.encode()).hexdigest()[:16]}.onnx"
        with locked(file.with_suffix(".lock")):
            if not file.exists():
                model = self._build_forms(config, dtype, cache_format, page_size, (form,), ranks)[form]
                file.write_bytes(ir.to_proto(model).SerializeToString())
        return ir.from_proto(onnx.load(file))

    @contextmanager
    def remembered(self):
        """Builds inside take remembered graphs. Yields the MonkeyPatch, for more of them."""

        def forms_of(*args, forms, **kwargs):
            return {form: self(*args, **kwargs, form=form) for form in forms}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graph, "build_forms", forms_of)
            yield patch

    def build_once(self, name: str, checkpoint: Path, out: Path, *options, **named) -> Path:
        """`out`: a copy of the bundle that was built once a run under this name."""
        with self.remembered():
            return once(self.folder / f"{name}.bundle", lambda first: build(checkpoint, first, *options, **named), out)
