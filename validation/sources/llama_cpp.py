"""A GGUF file, by llama.cpp through its Python package, which is optional."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from latentrt.validation import tokens
from latentrt.validation.errors import ValidationError
from latentrt.validation.sources import SourceOptions
from latentrt.validation.sources.base import Rows, Source
from latentrt.validation.tokens import WINDOW, Tokens


class LlamaCppSource(Source):
    """Raises ValidationError where llama_cpp is not installed or cannot load the file."""

    kind = "gguf"
    longest = WINDOW

    def __init__(self, location: str, options: SourceOptions):
        super().__init__(location)
        try:
            import llama_cpp
        except ImportError:
            raise ValidationError(
                f"{location}: llama.cpp runs it, and its package llama_cpp is not installed (pip install llama-cpp-python); "
                f"checkpoint:{location} lets transformers run it in float32"
            ) from None
        self.version = llama_cpp.__version__
        given = {"n_ctx": WINDOW, "n_batch": WINDOW, "n_ubatch": WINDOW, "logits_all": True, "verbose": False}
        try:
            self.model = llama_cpp.Llama(model_path=location, n_threads=options.threads or None, **given)
        except ValueError as error:  # what it raises for files that it does not take
            raise ValidationError(f"{location}: llama_cpp {self.version} cannot load it: {error}") from None
        self.vocab_size = self.model.n_vocab()

    def rows(self, windows: list[np.ndarray]) -> Iterator[Rows]:
        for window in windows:
            self.model.reset()
            self.model.eval(window.tolist())
            yield Rows.of_logits(window, np.array(self.model.scores[: len(window)]))

    def tokens(self, text: Path | None, count: int, longest: int) -> Tokens:
        if text is None:
            return tokens.pseudo_random(self.vocab_size, count, longest, "no --text was given")
        ids = self.model.tokenize(tokens.read_text(text).encode(), add_bos=False, special=True)[:count]
        return tokens.of_ids(np.array(ids, np.int64), longest, f"first {len(ids)} tokens of {text}, by llama.cpp")

    def describe(self) -> dict:
        return {"kind": self.kind, "name": self.name, "executed": f"llama_cpp {self.version}"}

    def close(self) -> None:
        self.model.close()
