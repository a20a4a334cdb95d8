"""One traced graph and one bundle per configuration, shared by all tests and by pytest-xdist's processes."""

import fcntl
import hashlib
import json
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch

from tests import checkpoints

torch.set_num_threads(1)  # models this small only lose by threads, fifty-fold where cores are shared


@contextmanager
def locked(path: Path):
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all of pytest-xdist's processes share for one run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if base.name.startswith("popen-") else base


@pytest.fixture(scope="session")
def traced(shared):
    """`export.graph.build`, remembered on disk: the same arguments are traced once a run. Returns fresh models."""
    from export import graph

    build_forms = graph.build_forms  # the real one: tests replace it

    def cached(config, dtype=torch.float32, cache_format="float32", page_size=64, form="absorbed") -> ir.Model:
        key = json.dumps([config.model_dump(), str(dtype), cache_format, page_size, form], sort_keys=True)
        file = shared / f"graph.{hashlib.sha256(key.encode()).hexdigest()[:16]}.onnx"
        with locked(file.with_suffix(".lock")):
            if not file.exists():
                model = build_forms(config, dtype, cache_format, page_size, (form,))[form]
                file.write_bytes(ir.to_proto(model).SerializeToString())
        return ir.from_proto(onnx.load(file))

    return cached


@pytest.fixture
def fast_trace(traced, monkeypatch) -> None:
    """Lets build.py take remembered graphs, in tests whose subject is not the trace."""
    from export import graph

    monkeypatch.setattr(graph, "build_forms", forms_of(traced))


def forms_of(traced):
    """`export.graph.build_forms` made of a remembered `build`."""
    return lambda *args, forms, **kwargs: {form: traced(*args, **kwargs, form=form) for form in forms}


@pytest.fixture(scope="session")
def small_checkpoint(shared) -> Path:
    """A random float32 checkpoint of tests.checkpoints.CONFIG; read-only."""
    folder = shared / "small_checkpoint"
    with locked(shared / "small_checkpoint.lock"):
        if not folder.exists():
            checkpoints.write(folder, seed=11)
    return folder
