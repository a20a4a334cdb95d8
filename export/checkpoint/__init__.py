"""Checkpoints on disk: which files, which tensors, how each weight is made of them. Nothing is unpickled or run."""

from importlib import import_module

__all__ = ["INDEX", "TOKENIZER_FILES", "Checkpoint", "combined_digest"]

_EXPORTED = {"INDEX": "folder", "TOKENIZER_FILES": "reader", "Checkpoint": "reader", "combined_digest": "reader"}


def __getattr__(name: str):
    """Imported when asked for: that a path is no checkpoint is told before torch is imported."""
    if name not in _EXPORTED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTED[name]}"), name)
