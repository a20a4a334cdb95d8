"""What a build checks with the runtime's own eyes: the tokenizer before it begins, one step of a target before its commit."""

import platform
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from latentrt.runtime import backends
from latentrt.runtime.backends.base import SequenceRows, pack
from latentrt.runtime.bundle.manifest import Executed
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.errors import BundleError
from latentrt.runtime.tokenizer import Tokenizer, eos_ids


def run(bundle: Bundle, name: str) -> Executed:
    """Loads a target and runs one token. BundleError if its logits are not finite."""
    with backends.load(bundle, name, cache_tokens=1) as backend:
        logits = backend.step(pack([SequenceRows([0], 0, [0])], np.array([[1]]))).logits()
    if not np.isfinite(logits).all():
        raise BundleError(f"target {name}: the first step's logits are not finite; the checkpoint's weights overflow float32")
    return Executed(machine=f"{platform.machine()}, {platform.node()}", date=datetime.now(UTC).isoformat(timespec="seconds"))


def check_tokenizer(checkpoint: Path, files: list[Path], config: dict) -> None:
    """Reads a checkpoint's tokenizer as the runtime will read the bundle's. BundleError, naming the file, if it cannot."""
    named = {file.name: file for file in files}
    eos_ids(str(checkpoint), named, config, Tokenizer.of(str(checkpoint), named))
