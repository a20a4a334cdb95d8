"""The tokens that everything is compared on: held-out text where there is some, pseudo-random ids otherwise."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latentrt.export import text as texts
from latentrt.export.checkpoint import Checkpoint
from latentrt.validation.errors import ValidationError

HELD_OUT = "held_out.txt"
WINDOW = 512  # tokens; each window is a sequence of its own
SEED = 20261121


@dataclass(frozen=True)
class Tokens:
    """Windows of token ids, and where they are from."""

    windows: list[np.ndarray]  # each [T]
    source: str
    is_text: bool  # False: perplexity says nothing about language


def load(checkpoint: Checkpoint, text: Path | None, count: int, longest: int) -> Tokens:
    """About `count` tokens in windows of at most `longest`: of `text`, the checkpoint's held_out.txt, or pseudo-random.

    Raises ValidationError if the text cannot be read or is too short, or there is no tokenizer for it.
    """
    if count < 16:
        raise ValidationError(f"--tokens is {count}, accepted: 16 or more")
    length = max(2, min(WINDOW, longest, count))
    path = text or (checkpoint.path / HELD_OUT if (checkpoint.path / HELD_OUT).is_file() else None)
    if path is None or (text is None and texts.source(checkpoint.path) is None):
        ids = np.random.default_rng(SEED).integers(0, checkpoint.config.vocab_size, count)
        source = f"{count} pseudo-random token ids, seed {SEED} (the checkpoint has no {HELD_OUT})"
        return Tokens(_cut(ids, length), source, False)
    ids = _encode(checkpoint, path)[:count]
    if len(ids) < 16:
        raise ValidationError(f"{path}: has {len(ids)} tokens, 16 or more are needed")
    return Tokens(_cut(ids, length), f"first {len(ids)} tokens of {path}", True)


def _encode(checkpoint: Checkpoint, path: Path) -> np.ndarray:
    """Token ids of a text file, special tokens in the text taken as such, none added."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValidationError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    with checkpoint.text_folder() as folder:
        if texts.source(folder) is None:
            missing = f"{checkpoint.path}: has no tokenizer, so {path} cannot be tokenized"
            raise ValidationError(f"{missing}; leave --text out for pseudo-random ids")
        ids = np.array(texts.load(folder).backend_tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
    if len(ids) and ids.max() >= checkpoint.config.vocab_size:
        vocab_size = checkpoint.config.vocab_size
        raise ValidationError(f"{checkpoint.path}: its tokenizer gives token id {ids.max()}, the model has {vocab_size}")
    return ids


def _cut(ids: np.ndarray, length: int) -> list[np.ndarray]:
    windows = [ids[i : i + length] for i in range(0, len(ids), length)]
    return [w for w in windows if len(w) >= 2]
