"""The facts about text that a bundle keeps, so that its runtime needs neither transformers nor the checkpoint's files."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from latentrt.export.errors import CheckpointError
from latentrt.export.text import files, tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SAMPLED_TOP_K = 50  # what transformers takes for top_k where do_sample is true and nothing is said
_OTHER = {  # fields of generation_config.json that change an answer and are not applied here, with the values that do nothing
    "num_beams": 1, "typical_p": 1.0, "epsilon_cutoff": 0, "eta_cutoff": 0, "no_repeat_ngram_size": 0, "penalty_alpha": 0,
    "min_new_tokens": 0, "min_length": 0, "bad_words_ids": [], "suppress_tokens": [], "begin_suppress_tokens": [],
    "sequence_bias": {}, "exponential_decay_length_penalty": [], "guidance_scale": 1, "forced_bos_token_id": ...,
    "stop_strings": [], "forced_eos_token_id": ..., "watermarking_config": {}, "top_h": ...,
}  # fmt: skip


@dataclass(frozen=True)
class EndToken:
    """A token that ends an answer: `token` is its text where there is a tokenizer that knows it, `sources` who says so."""

    id: int
    token: str | None
    sources: tuple[str, ...]


@dataclass(frozen=True)
class BakedText:
    """See runtime/bundle/manifest.py: Text, which has the same fields."""

    end_of_text: tuple[EndToken, ...]
    sampling: dict[str, int | float]
    ignored: tuple[str, ...]
    tokenizer: str | None = None  # content of tokenizer.json
    source: str = ""
    vocab_size: int = 0
    special_tokens: dict[str, str] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)  # Jinja sources by name


def bake(folder: Path, eos_token_id: int | list[int] | None, vocab_size: int) -> BakedText:
    """The facts of a checkpoint whose config.json has this eos_token_id and vocab_size.

    Raises CheckpointError naming the file and field.
    """
    generation = files.read(folder, files.GENERATION)
    said = [(id, "config.json") for id in _ids(folder, eos_token_id)]
    said += [(id, files.GENERATION) for id in _ids(folder, generation.get("eos_token_id"))]
    rest = {"sampling": _sampling(generation), "ignored": _ignored(generation)}
    if tokenizer.source(folder) is None:
        return BakedText(_end_of_text(said, None), **rest)
    loaded = tokenizer.load(folder)
    backend, templates = loaded.backend_tokenizer, _templates(loaded)
    _check_prompts(folder, backend.encode("a").ids, backend, vocab_size)
    eos = backend.token_to_id(loaded.eos_token) if loaded.eos_token else None
    said += [(eos, "tokenizer")] if eos is not None else []
    said += [(id, "chat template") for name in templates for id in _turn_ends(loaded, name)]
    return BakedText(
        _end_of_text(said, backend), **rest, tokenizer=backend.to_str(), source=_source(folder, loaded),
        vocab_size=backend.get_vocab_size(), special_tokens=loaded.special_tokens_map, templates=templates,
    )  # fmt: skip


def _ids(folder: Path, found) -> list[int]:
    accepts, accepted = files.TOKEN_IDS
    if found is None:
        return []
    if not accepts(found):
        raise CheckpointError(f"{folder / 'config.json'}: eos_token_id is {found!r}, accepted: {accepted}, or null")
    return found if isinstance(found, list) else [found]


def _end_of_text(said: list[tuple[int, str]], backend) -> tuple[EndToken, ...]:
    sources: dict[int, dict[str, None]] = {}
    for id, source in said:
        sources.setdefault(id, {})[source] = None
    return tuple(EndToken(id, backend.id_to_token(id) if backend else None, tuple(s)) for id, s in sources.items())


def _sampling(generation: dict) -> dict[str, int | float]:
    """Fields of SamplingParams that generation_config.json gives. Greedy unless do_sample is true, as in transformers."""
    names = "top_p", "min_p", "repetition_penalty", "max_new_tokens"
    given = {name: generation[name] for name in names if name in generation}
    if "top_k" in generation:
        given["top_k"] = max(0, generation["top_k"])
    if generation.get("do_sample"):
        given = {"temperature": generation.get("temperature", 1.0), "top_k": SAMPLED_TOP_K} | given
    return given


def _ignored(generation: dict) -> tuple[str, ...]:
    return tuple(f"{n} {str(generation[n])[:40]}" for n, nothing in _OTHER.items() if generation.get(n, nothing) != nothing)


def _templates(loaded: "PreTrainedTokenizerFast") -> dict[str, str]:
    found = loaded.chat_template
    return found if isinstance(found, dict) else {"default": found} if found is not None else {}


def _turn_ends(loaded: "PreTrainedTokenizerFast", name: str) -> Iterator[int]:
    """The added token that a template writes right after an assistant's text, if it does."""
    said = "assistant's text"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]
    try:
        text = loaded.apply_chat_template(messages, chat_template=_templates(loaded)[name], tokenize=False)
    except Exception:  # a template may refuse any conversation, in many ways: then it says nothing here
        return
    behind = text.rpartition(said)[2].lstrip() if said in text else ""
    added = {token.content: id for id, token in loaded.added_tokens_decoder.items()}
    longest = max((content for content in added if behind.startswith(content)), key=len, default=None)
    if longest is not None:
        yield added[longest]


def _check_prompts(folder: Path, ids: list[int], backend, vocab_size: int) -> None:
    """What stands in front of every prompt must be a token of the model."""
    beyond = next((id for id in ids if id >= vocab_size), None)
    if beyond is not None:
        raise CheckpointError(
            f"{tokenizer.source(folder)}: a prompt has token {backend.id_to_token(beyond)!r}, id {beyond}, but config.json "
            f"says vocab_size {vocab_size}; the tokenizer belongs to another model"
        )


def _source(folder: Path, loaded: "PreTrainedTokenizerFast") -> str:
    """For people: which file, and the class that it is named for or was converted by."""
    file = tokenizer.source(folder).name
    name = files.read(folder, files.CONFIG).get("tokenizer_class") if file == files.TOKENIZER else type(loaded).__name__
    return f"{file}, {name}" if name else file
