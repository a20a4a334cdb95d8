"""Two sources side by side: which tokens they are compared on, and the comparison."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latentrt.validation.errors import ValidationError
from latentrt.validation.sources import SourceOptions, difference, open_source
from latentrt.validation.sources.base import Source
from latentrt.validation.sources.difference import Difference
from latentrt.validation.tokens import Tokens, check_count


@dataclass(frozen=True)
class Pair:
    """`second` is held to `first`."""

    first: Source
    second: Source

    def tokens(self, text: Path | None, ids: Path | None, count: int) -> Tokens:
        """The tokens of a recorded run, where one is among the two; else of `ids`, else of a text, by the first source that
        can say. ValidationError."""
        check_count(count)
        bound = [source for source in (self.first, self.second) if source.given]
        if bound and (text or ids):
            raise ValidationError(f"{bound[0].name}: has tokens of its own; leave --text and --ids out")
        if bound:
            return _first(bound[0].given, count)
        longest = min(self.first.longest, self.second.longest)
        if ids:
            return _read(ids, longest)
        for source in (self.first, self.second):
            if found := source.tokens(text, count, longest):
                return found
        raise ValidationError(f"neither {self.first.name} nor {self.second.name} has a tokenizer; give token ids with --ids")

    def compare(self, tokens: Tokens, progress: Callable[[int], None] = lambda window: None) -> Difference:
        """See `difference.compare`."""
        return difference.compare(self.first, self.second, tokens.windows, progress)


@contextmanager
def opened(first: str, second: str, options: SourceOptions) -> Iterator[Pair]:
    """Two locations, see `open_source`."""
    with open_source(first, options) as one, open_source(second, options) as other:
        yield Pair(one, other)


def _first(tokens: Tokens, count: int) -> Tokens:
    """Whole windows of about `count` tokens."""
    ends = np.cumsum(list(map(len, tokens.windows)))
    return Tokens(tokens.windows[: 1 + int(np.searchsorted(ends, count))], tokens.source, tokens.is_text)


def _read(path: Path, longest: int) -> Tokens:
    try:
        lists = json.loads(path.read_text())
        windows = [np.array(tokens, np.int64) for tokens in lists]
    except (OSError, ValueError, TypeError) as error:
        raise ValidationError(f"{path}: is no list of token-id lists ({error}); [[1, 2, 3], [4, 5]] is one") from None
    if not windows or any(w.ndim != 1 or not 2 <= len(w) <= longest or w.min() < 0 for w in windows):
        raise ValidationError(f"{path}: accepted are lists of 2 to {longest} token ids, 0 or more each")
    return Tokens(windows, str(path), True)
