"""One step of a target that was just built, before it is committed: a bundle that does not run here is not one."""

import platform
from datetime import UTC, datetime
from types import SimpleNamespace

import numpy as np

from runtime import tokenizer as tokenizers
from runtime.backends.base import SequenceRows, StepBatch
from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.bundle import BundleError, BundleWriter
from runtime.manifest import Executed, FileRef, Target


def execute(writer: BundleWriter, name: str, target: Target) -> Executed:
    """Loads a cpu target from a bundle that is being written and runs one token. BundleError if its logits are not finite."""
    backend = OnnxRuntimeBackend(writer, name, target, cache_tokens=1)
    logits = backend.step(StepBatch.of([SequenceRows([0], 0, [0])], np.array([[1]])))
    if not np.isfinite(logits).all():
        raise BundleError(f"target {name}: the first step's logits are not finite; the checkpoint's weights overflow float32")
    return Executed(machine=f"{platform.machine()}, {platform.node()}", date=datetime.now(UTC).isoformat(timespec="seconds"))


def check_tokenizer(writer: BundleWriter, files: dict[str, FileRef], config: dict) -> None:
    """Reads the tokenizer as the runtime will, before the commit. BundleError if it cannot."""
    bundle = SimpleNamespace(path=writer.path, file=writer.file, manifest=SimpleNamespace(tokenizer=files, config=config))
    tokenizers.eos_ids(bundle, tokenizers.load(bundle))
