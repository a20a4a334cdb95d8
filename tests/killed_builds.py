"""Kills builds at every call that changes what a reader of the bundle's folder can see. Run as a process of its own by
test_build.py: it forks, which is safe only where no other threads run.

    python -m tests.killed_builds CHECKPOINT GRAPH.onnx FOLDER

fsync is no such call: what a killed process has written is in the page cache, whether synced or not (only a loss of power
could tell). Prints one JSON line per point of death.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch

from latentrt import builder
from latentrt.export.models.deepseek_v2 import model as deepseek_v2  # noqa: F401 (registers the ops before the fork)
from latentrt.plugins.step_graph import StepBatch
from latentrt.runtime import backends
from latentrt.runtime.bundle.reader import Bundle
from tests import checkpoints, ragged
from tests.builds import build

CALLS = (os, "replace"), (os, "unlink"), (os, "rmdir"), (Path, "unlink"), (Path, "rmdir"), (shutil, "rmtree")


def in_child(action) -> tuple[int, dict]:
    """Runs `action` in a forked child; returns its exit status (or -signal) and what it returned."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(writer, json.dumps(action()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader, "rb") as stream:
        text = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), json.loads(text or b"{}")


def die_at(number: int) -> None:
    """From now on, kills this process just before the `number`-th call (from 1) of CALLS."""
    count = 0

    def deadly(real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for owner, name in CALLS:
        setattr(owner, name, deadly(getattr(owner, name)))


def logits_digest(out: Path) -> dict:
    """Digest of the logits of one prompt, as a reader of the bundle gets them."""
    backend = backends.load(Bundle(out), cache_tokens=64, threads=1)
    tokens = checkpoints.random_tokens([9], vocab_size=40)
    logits = backend.step(StepBatch(**ragged.batch(tokens, [0], np.array([[1]])))).logits()
    return {"logits": hashlib.sha256(logits.tobytes()).hexdigest()}


def files(out: Path) -> list[str]:
    return sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())


def main(checkpoint: Path, graph: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    model = onnx.load(graph)
    builder.step_graphs.build_forms = lambda *args, **kwargs: {"absorbed": ir.from_proto(model)}
    builder.smoke_test.run = lambda bundle, name: None  # no part of the commit, and takes most of the time

    def make(out: Path, precision: str) -> dict:
        build(checkpoint, out, "cpu", precision, "exact", force=True)
        return logits_digest(out) | {"files": files(out)}

    old, reference = folder / "old", folder / "reference"
    expected = {name: in_child(lambda n=name, o=out: make(o, n))[1] for name, out in (("fp32", old), ("int8", reference))}
    number, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        number += 1
        out = shutil.copytree(old, folder / f"killed.{number}")
        code, _ = in_child(lambda o=out, n=number: (die_at(n), make(o, "int8"))[1])
        _, after = in_child(lambda o=out: logits_digest(o))
        garbage = len(files(out)) - len(expected["fp32"]["files"])
        _, again = in_child(lambda o=out: make(o, "int8"))
        precision = {v["logits"]: k for k, v in expected.items()}.get(after.get("logits"))
        print(json.dumps({
            "number": number, "code": code, "reads": precision, "garbage": garbage,
            "next": again.get("logits") == expected["int8"]["logits"], "clean": again.get("files") == expected["int8"]["files"],
        }), flush=True)  # fmt: skip
        shutil.rmtree(out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
