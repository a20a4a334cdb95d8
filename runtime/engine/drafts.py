"""Guesses at the next tokens, from what the text repeats: after the same few tokens, those that followed the last time."""

from collections.abc import Sequence

NGRAM = 3  # tokens that must be the same


class Drafter:
    """Remembers where every run of `ngram` tokens of a growing list ended last."""

    def __init__(self, ngram: int = NGRAM):
        self._ngram = ngram
        self._ends: dict[tuple[int, ...], int] = {}
        self._known = 0  # runs that end before this token are remembered

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens that may come next; none where the last ones are new."""
        n = self._ngram
        for end in range(max(self._known, n), len(tokens)):
            self._ends[tuple(tokens[end - n : end])] = end
        self._known = max(self._known, len(tokens))
        end = self._ends.get(tuple(tokens[-n:])) if len(tokens) >= n else None
        return [] if end is None else list(tokens[end : end + count])
