"""A checkpoint's tokenizer, read by transformers from whatever files the folder has. No remote code runs.

A tokenizer.json is taken as it is, with the tokens that the other files add: the class for that is PreTrainedTokenizerFast,
which is also what AutoTokenizer takes for DeepSeek's checkpoints. Some classes that a tokenizer_config.json may name
(GPT2Tokenizer, CodeLlamaTokenizer, ...) would build a pipeline of their own around its vocabulary, and other ids come out.
Without a tokenizer.json, AutoTokenizer converts the SentencePiece model, or vocab.json and merges.txt, by that class.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import processors

from latentrt.export.errors import CheckpointError
from latentrt.export.text import files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PROBES = 50  # words


def check(folder: Path) -> None:
    """What is told without transformers: `files.check`, and whether a SentencePiece model is one. Raises CheckpointError."""
    files.check(folder)
    vocabulary = source(folder)
    if vocabulary and vocabulary.suffix == ".model":
        _check_model(vocabulary)


def source(folder: Path) -> Path | None:
    """The file that holds the vocabulary; None where there is no tokenizer."""
    candidates = [folder / files.TOKENIZER, folder / "tokenizer.model", *sorted(folder.glob("*.model")), folder / "vocab.json"]
    return next((file for file in candidates if file.is_file()), None)


def load(folder: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of a folder that has one. Its backend adds what belongs in front of a prompt, and neither cuts nor pads.

    Raises CheckpointError naming the file if transformers makes nothing of it, or something else than the files say.
    """
    vocabulary, config = source(folder), files.read(folder, files.CONFIG)
    if vocabulary.suffix == ".model":
        _check_model(vocabulary)
    with _quiet():
        tokenizer = _read(folder, vocabulary, config)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    _check_ids(folder, backend)
    if vocabulary.suffix == ".model":
        _check_conversion(vocabulary, backend)
    if "add_bos_token" in config:
        _set_bos(folder, tokenizer, config["add_bos_token"])
    return tokenizer


def _read(folder: Path, vocabulary: Path, config: dict) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    reader = PreTrainedTokenizerFast if vocabulary.name == files.TOKENIZER else AutoTokenizer
    try:
        tokenizer = reader.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # what its many readers raise has no common class
        said = str(error).strip().splitlines() or [repr(error)]
        raise CheckpointError(
            f"{vocabulary}: transformers {version('transformers')} makes no tokenizer of it, with tokenizer_class "
            f"{config.get('tokenizer_class')!r} ({said[0]}); add the tokenizer.json of this model"
        ) from None
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"{vocabulary}: transformers reads it as {type(tokenizer).__name__}, which is no fast tokenizer; add the "
            "tokenizer.json of this model"
        )
    return tokenizer


def _check_ids(folder: Path, backend) -> None:
    """transformers adds tokens one after another, whatever ids the files give them."""
    declared = files.declared_ids(folder)
    others = [token for token, (id, _) in declared.items() if backend.token_to_id(token) != id]
    has_own = others and (folder / files.TOKENIZER).is_file()
    known = files.read_tokenizer(folder / files.TOKENIZER) if has_own else None  # its own ids count
    for token in others:
        if known is None or known.token_to_id(token) is None:
            id, file = declared[token]
            raise CheckpointError(
                f"{folder / file}: token {token!r} has id {id}, but comes out as {backend.token_to_id(token)} when it is "
                "added; ids of added tokens must follow the vocabulary without gaps, or stand in tokenizer.json"
            )


def _set_bos(folder: Path, tokenizer: "PreTrainedTokenizerFast", wanted: bool) -> None:
    """Lets add_bos_token decide, as in transformers 4, which DeepSeek's checkpoints are for; 5 looks at tokenizer.json only."""
    bos, backend = tokenizer.bos_token, tokenizer.backend_tokenizer
    id = backend.token_to_id(bos) if bos else None
    if id is None:
        if wanted:
            raise CheckpointError(f"{folder / files.CONFIG}: add_bos_token is true, but bos_token is missing; name the token")
        return
    if wanted != (backend.encode("a").ids[:1] == [id]):
        template = {"single": [bos, "$A"], "special_tokens": [(bos, id)]} if wanted else {"single": "$A", "special_tokens": []}
        backend.post_processor = processors.TemplateProcessing(**template)


def _check_model(file: Path) -> None:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise CheckpointError(f"{file}: reading it needs the package sentencepiece; pip install sentencepiece") from None
    try:
        SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{file}: sentencepiece cannot read it ({error}); download it again") from None


def _check_conversion(file: Path, backend) -> None:
    """A right conversion keeps the ids of plain words, here the longest of the vocabulary's own."""
    from sentencepiece import SentencePieceProcessor

    original = SentencePieceProcessor(model_file=str(file))
    pieces = {original.id_to_piece(id).strip("\u2581") for id in range(original.get_piece_size())}
    longest = sorted((piece for piece in pieces if piece.isalpha()), key=lambda piece: (-len(piece), piece))
    for text in longest[:_PROBES]:
        wanted, found = original.encode(text), backend.encode(text, add_special_tokens=False).ids
        if wanted != found:
            raise CheckpointError(
                f"{file}: transformers {version('transformers')} makes other ids of {text!r} ({found}) than sentencepiece does "
                f"({wanted}); name the right tokenizer_class in {files.CONFIG}, or add the tokenizer.json of this model"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings: what matters of them is checked here."""
    from transformers.utils import logging as hf_logging

    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)
