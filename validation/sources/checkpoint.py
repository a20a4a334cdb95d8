"""A checkpoint, by transformers in float32: the audited reference."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import transformers

from latentrt.export.checkpoint import Checkpoint, combined_digest
from latentrt.validation import tokens
from latentrt.validation.reference.model import Reference
from latentrt.validation.sources import SourceOptions
from latentrt.validation.sources.base import Rows, Source
from latentrt.validation.tokens import Tokens


class CheckpointSource(Source):
    """Raises CheckpointError, and ReferenceRefused where transformers computes another model."""

    kind = "checkpoint"

    def __init__(self, location: str, options: SourceOptions):
        super().__init__(location)
        self.checkpoint = Checkpoint(Path(location))
        self.checkpoint.check()
        self.reference = Reference(self.checkpoint)
        self.vocab_size = self.checkpoint.config.vocab_size
        self.longest = self.checkpoint.config.max_position_embeddings

    def rows(self, windows: list[np.ndarray]) -> Iterator[Rows]:
        return (Rows.of_logits(window, self.reference.logits(window)) for window in windows)

    def tokens(self, text: Path | None, count: int, longest: int) -> Tokens:
        return tokens.load(self.checkpoint, text, count, longest)

    def describe(self) -> dict:
        digest = combined_digest(self.checkpoint.file_digests())
        return {
            "kind": self.kind, "name": self.name, "storage": self.checkpoint.storage, "checkpoint_sha256": digest,
            "executed": f"transformers {transformers.__version__}, float32, on {self.reference.weights}",
        }  # fmt: skip
