"""Checkpoints on disk: which files, which tensors, how each weight is made of them. Nothing is unpickled or run."""

from latentrt.export.checkpoint.folder import INDEX
from latentrt.export.checkpoint.reader import TOKENIZER_FILES, Checkpoint, combined_digest

__all__ = ["INDEX", "TOKENIZER_FILES", "Checkpoint", "combined_digest"]
