"""Kills builds at every call that changes what a reader of the bundle's folder can see, and amid the threads that fill shards.
Run as a process of its own by test_build.py: it forks, which is safe only where no other threads run.

    python -m tests.killed_builds CHECKPOINT GRAPH.onnx FOLDER

fsync is no such call: what a killed process has written is in the page cache, whether synced or not (only a loss of power
could tell). Prints one JSON line per point of death.
"""

import hashlib
import itertools
import json
import os
import random
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

CHANGES = (os, "replace"), (os, "unlink"), (os, "rmdir"), (Path, "unlink"), (Path, "rmdir"), (shutil, "rmtree")
WRITES = ((os, "pwrite"),)  # of slabs, by several threads: which slabs are there when it dies differs from run to run
WRITES_TRIED, WRITES_AT_LEAST = 6, 90  # of about a hundred; which ones is drawn anew each time


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


def die_at(number: int, calls) -> None:
    """From now on, kills this process just before the `number`-th (from 1) of `calls`, whatever thread it is in."""
    numbers = itertools.count(1)  # next() is atomic

    def deadly(real):
        def call(*args, **kwargs):
            if next(numbers) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for owner, name in calls:
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

    def killed(number: int, calls) -> int:
        """Lets a build die, reads the bundle, builds again; prints what came of it and returns the exit status."""
        out = shutil.copytree(old, folder / f"killed.{number}")
        code, _ = in_child(lambda: (die_at(number, calls), make(out, "int8"))[1])
        _, after = in_child(lambda: logits_digest(out))
        garbage = len(files(out)) - len(expected["fp32"]["files"])
        _, again = in_child(lambda: make(out, "int8"))
        precision = {v["logits"]: k for k, v in expected.items()}.get(after.get("logits"))
        print(json.dumps({
            "at": calls[0][1], "number": number, "code": code, "reads": precision, "garbage": garbage,
            "next": again.get("logits") == expected["int8"]["logits"], "clean": again.get("files") == expected["int8"]["files"],
        }), flush=True)  # fmt: skip
        shutil.rmtree(out)
        return code

    for number in random.sample(range(1, WRITES_AT_LEAST), WRITES_TRIED):
        killed(number, WRITES)
    number = 1
    while killed(number, CHANGES) == -signal.SIGKILL:
        number += 1


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
