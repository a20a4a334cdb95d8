"""Sample tokens for the calibration of static scales, read and checked before anything is computed."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from latentrt.export import text as texts
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.errors import BuildError
from latentrt.export.models.base import Config

Tokens = tuple[int, ...]  # ids of one sequence
TEXT_SEQUENCE = 512  # tokens of one sequence that a text is cut into


@dataclass(frozen=True)
class Samples:
    """Token ids of sequences, at least one and none empty."""

    sequences: tuple[Tokens, ...]

    @property
    def digest(self) -> str:
        """Identifies the tokens, whatever file they came from."""
        return hashlib.sha256(json.dumps(self.sequences).encode()).hexdigest()


def read_samples(file: Path | str, checkpoint: Checkpoint) -> Samples:
    """Sample tokens: a JSON list of lists of token ids, or UTF-8 text for the checkpoint's tokenizer.

    A file that begins with [ or { is taken for JSON. Text is cut into sequences of TEXT_SEQUENCE tokens. Raises BuildError
    for what cannot be read, ids outside the vocabulary, and sequences longer than max_position_embeddings.
    """
    file, longest = Path(file), checkpoint.config.max_position_embeddings
    text = _text(file)
    if text.lstrip()[0] in "[{":
        sequences = _token_lists(file, text)
    else:
        ids, length = _encode(file, text, checkpoint), min(TEXT_SEQUENCE, longest)
        sequences = [ids[i : i + length] for i in range(0, len(ids), length)]
    for number, sequence in enumerate(sequences):
        _check(f"calibration {file}: sequence {number}", sequence, checkpoint.config)
    return Samples(tuple(map(tuple, sequences)))


def _text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BuildError(f"calibration {file}: cannot be read ({error.strerror}); give a file of sample tokens") from None
    except UnicodeDecodeError as error:
        raise BuildError(f"calibration {file}: not UTF-8 ({error}); accepted: text, or a JSON list of id lists") from None
    if not text.strip():
        raise BuildError(f"calibration {file}: is empty; give text, or a JSON list of lists of token ids")
    return text


def _token_lists(file: Path, text: str) -> list[list[int]]:
    expected = "expected a list of lists of token ids such as [[1, 2, 3], [4]] (text must not begin with [ or {)"
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BuildError(f"calibration {file}: begins like JSON, but is none ({error}); {expected}") from None
    if not isinstance(found, list) or not found:
        raise BuildError(f"calibration {file}: holds {str(found)[:40]!r}, {expected}")
    for number, sequence in enumerate(found):
        if not isinstance(sequence, list) or not sequence or any(type(i) is not int for i in sequence):
            raise BuildError(f"calibration {file}: sequence {number} is {str(sequence)[:40]!r}, {expected}")
    return found


def _encode(file: Path, text: str, checkpoint: Checkpoint) -> list[int]:
    with checkpoint.text_folder() as folder:
        if texts.source(folder) is None:
            raise BuildError(
                f"calibration {file}: is text, and the checkpoint has no tokenizer.json ({checkpoint.path}); add it, or give "
                "a JSON list of lists of token ids"
            )
        return texts.load(folder).backend_tokenizer.encode(text).ids


def _check(where: str, sequence: list[int], config: Config) -> None:
    stranger = next((i for i in sequence if not 0 <= i < config.vocab_size), None)
    if stranger is not None:
        raise BuildError(f"{where} has token id {stranger}, accepted: 0 to {config.vocab_size - 1}; is it another model's?")
    if len(sequence) > config.max_position_embeddings:
        longest = f"accepted: 1 to {config.max_position_embeddings} (max_position_embeddings)"
        raise BuildError(f"{where} has {len(sequence)} tokens, {longest}; cut it")
