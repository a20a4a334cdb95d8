"""What a build checks with the runtime's own eyes: the tokenizer before it begins, one step of a target before its commit."""

import platform
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from runtime import tokenizer as tokenizers
from runtime.backends.base import SequenceRows, StepBatch
from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.bundle import BundleError, BundleWriter
from runtime.manifest import Executed, Target


def execute(writer: BundleWriter, name: str, target: Target) -> Executed:
    """Loads a cpu target from a bundle that is being written and runs one token. BundleError if its logits are not finite."""
    backend = OnnxRuntimeBackend(writer, name, target, cache_tokens=1)
    logits = backend.step(StepBatch.of([SequenceRows([0], 0, [0])], np.array([[1]])))
    if not np.isfinite(logits).all():
        raise BundleError(f"target {name}: the first step's logits are not finite; the checkpoint's weights overflow float32")
    return Executed(machine=f"{platform.machine()}, {platform.node()}", date=datetime.now(UTC).isoformat(timespec="seconds"))


def check_tokenizer(checkpoint: Path, files: list[Path], config: dict) -> None:
    """Reads a checkpoint's tokenizer as the runtime will read the bundle's. BundleError, naming the file, if it cannot."""
    manifest = SimpleNamespace(tokenizer={file.name: file for file in files}, config=config)
    bundle = SimpleNamespace(path=checkpoint, file=lambda file: file, manifest=manifest)
    tokenizers.eos_ids(bundle, tokenizers.load(bundle))
