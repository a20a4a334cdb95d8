"""The tokens that everything is compared on: held-out text where there is some, pseudo-random ids otherwise."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latentrt.export import text as texts
from latentrt.export.checkpoint import Checkpoint
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.tokenizer import Tokenizer
from latentrt.validation.errors import ValidationError

HELD_OUT = "held_out.txt"
WINDOW = 512  # tokens; each window is a sequence of its own
SEED = 20261121
FEWEST = 16  # tokens to compare on


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
    check_count(count)
    path = text or (checkpoint.path / HELD_OUT if (checkpoint.path / HELD_OUT).is_file() else None)
    if path is None or (text is None and texts.source(checkpoint.path) is None):
        return pseudo_random(checkpoint.config.vocab_size, count, longest, f"the checkpoint has no {HELD_OUT}")
    ids = _encode(checkpoint, path)[:count]
    return of_ids(ids, longest, f"first {len(ids)} tokens of {path}")


def of_bundle(bundle: Bundle, text: Path | None, count: int, longest: int) -> Tokens:
    """The same by a bundle's own tokenizer, where the checkpoint need not be; its held_out.txt is taken if it is there."""
    check_count(count)
    held_out = Path(bundle.manifest.checkpoint.path) / HELD_OUT
    path, tokenizer = text or (held_out if held_out.is_file() else None), Tokenizer.of(bundle)
    if path is None or (text is None and tokenizer is None):
        return pseudo_random(bundle.manifest.config["vocab_size"], count, longest, f"there is no {held_out}")
    content = read_text(path)
    if tokenizer is None:
        raise no_tokenizer(bundle.path, path)
    ids = np.array(tokenizer.encode(content, special=False)[:count], np.int64)
    return of_ids(ids, longest, f"first {len(ids)} tokens of {path}")


def check_count(count: int) -> None:
    """How many tokens may be asked for. ValidationError."""
    if count < FEWEST:
        raise ValidationError(f"--tokens is {count}, accepted: {FEWEST} or more")


def pseudo_random(vocab_size: int, count: int, longest: int, why: str) -> Tokens:
    """Ids that are the same every time."""
    ids = np.random.default_rng(SEED).integers(0, vocab_size, count)
    return Tokens(_cut(ids, longest), f"{count} pseudo-random token ids, seed {SEED} ({why})", False)


def of_ids(ids: np.ndarray, longest: int, source: str) -> Tokens:
    """Token ids [T] of a text, cut into windows. ValidationError if there are too few."""
    if len(ids) < FEWEST:
        raise ValidationError(f"{source}: {len(ids)} tokens, {FEWEST} or more are needed")
    return Tokens(_cut(ids, longest), source, True)


def read_text(path: Path) -> str:
    """A text file. ValidationError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValidationError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def no_tokenizer(where: Path | str, text: Path) -> ValidationError:
    """What to say where a text was given and nothing to tokenize it."""
    missing = f"{where}: has no tokenizer, so {text} cannot be tokenized"
    return ValidationError(f"{missing}; leave --text out for pseudo-random ids")


def _encode(checkpoint: Checkpoint, path: Path) -> np.ndarray:
    """Token ids of a text file, special tokens in the text taken as such, none added."""
    text = read_text(path)
    with checkpoint.text_folder() as folder:
        if texts.source(folder) is None:
            raise no_tokenizer(checkpoint.path, path)
        ids = np.array(texts.load(folder).backend_tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
    if len(ids) and ids.max() >= checkpoint.config.vocab_size:
        vocab_size = checkpoint.config.vocab_size
        raise ValidationError(f"{checkpoint.path}: its tokenizer gives token id {ids.max()}, the model has {vocab_size}")
    return ids


def _cut(ids: np.ndarray, longest: int) -> list[np.ndarray]:
    length = max(2, min(WINDOW, longest, len(ids)))
    windows = [ids[i : i + length] for i in range(0, len(ids), length)]
    return [w for w in windows if len(w) >= 2]
