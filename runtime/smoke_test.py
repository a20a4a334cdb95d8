"""What a build checks with the runtime's own eyes: one step of a target before its commit."""

import platform
from datetime import UTC, datetime

import numpy as np

from latentrt.runtime import backends
from latentrt.runtime.backends.base import SequenceRows, pack
from latentrt.runtime.bundle.manifest import Executed
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.errors import BundleError


def run(bundle: Bundle, name: str) -> Executed:
    """Loads a target and runs one token. BundleError if its logits are not finite.

    Its weights are mapped, so that a build needs no more memory than its largest product takes; the graph is the engine's.
    """
    with backends.load(bundle, name, cache_tokens=1, mapped=True) as backend:
        logits = backend.step(pack([SequenceRows([0], 0, [0])], np.array([[1]]))).logits()
    if not np.isfinite(logits).all():
        raise BundleError(f"target {name}: the first step's logits are not finite; the checkpoint's weights overflow float32")
    return Executed(machine=f"{platform.machine()}, {platform.node()}", date=datetime.now(UTC).isoformat(timespec="seconds"))
