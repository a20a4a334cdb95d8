"""How far two sources are apart on the same tokens: the first is what the second is held to.

Where one of them tells only the likeliest tokens, KL is that of distributions over the tokens that both tell and one "anything
else": never more than the whole one, and nearly it where little is left over.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from latentrt.validation.errors import ValidationError
from latentrt.validation.judge import metrics
from latentrt.validation.judge.statistics import standard_error
from latentrt.validation.sources.base import Rows, Source

_LEAST = 1e-12  # of "anything else", which sums of rounded numbers may make negative


@dataclass(frozen=True)
class Divergence:
    """KL of each row, nats; covered: how much of the first's probability the compared tokens have; whole: all of them."""

    kl: np.ndarray
    covered: np.ndarray
    whole: bool


def divergence(first: Rows, second: Rows) -> Divergence:
    """KL(first || second) row by row."""
    if first.ids is None and second.ids is None:
        return Divergence(metrics.kl_divergence(first.logprobs, second.logprobs), np.ones(len(first.logprobs)), True)
    p, q = shared(first, second)
    both = np.isfinite(p) & np.isfinite(q)
    p, q = np.where(both, p, -np.inf), np.where(both, q, -np.inf)
    covered, other = np.exp(p).sum(-1), np.exp(q).sum(-1)
    terms = np.exp(p) * np.where(both, p - np.where(both, q, 0), 0)
    left, theirs = np.maximum(1 - covered, _LEAST), np.maximum(1 - other, _LEAST)
    return Divergence(np.maximum(terms.sum(-1) + left * np.log(left / theirs), 0.0), np.minimum(covered, 1.0), False)


def shared(first: Rows, second: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Log probabilities [T, k] of the same tokens; -inf where one of them does not tell."""
    if first.ids is None:
        return shared(second, first)[::-1]
    if second.ids is None:
        known = np.take_along_axis(second.logprobs, first.ids.clip(0), -1)
        return first.logprobs, np.where(first.ids < 0, -np.inf, known)
    same = (first.ids[:, :, None] == second.ids[:, None, :]) & (first.ids >= 0)[:, :, None]
    known = np.where(same, second.logprobs[:, None, :], -np.inf).max(-1)
    return first.logprobs, known


@dataclass(frozen=True)
class Parting:
    """Where the likeliest next token is another one for the first time. margin: of log probability, in the first source."""

    window: int
    position: int
    first: int
    second: int
    margin: float | None


@dataclass(frozen=True)
class Difference:
    """Over all tokens. Errors are standard errors of means; perplexity's are of the paired difference."""

    tokens: int
    kl_mean: float
    kl_error: float
    kl_p99: float
    kl_max: float
    kl_max_at: tuple[int, int]  # window, position
    kl_is_whole: bool
    covered: float  # mean probability of the compared tokens, as the first source has it
    top1_agreement: float
    top1_error: float
    perplexity_first: float
    perplexity_second: float
    perplexity_difference: float
    perplexity_error: float
    first_parting: Parting | None


def compare(
    first: Source, second: Source, windows: list[np.ndarray], progress: Callable[[int], None] = lambda window: None
) -> Difference:
    """Both on the same windows, a window's rows in memory at a time. ValidationError for two vocabularies."""
    parts, equal, losses, parting = [], [], [], None
    for index, (window, (a, b)) in enumerate(zip(windows, _pairs(first, second, windows), strict=True)):
        parts.append(divergence(a, b))
        equal.append((a.best == b.best).astype(float))
        losses.append((-a.following, -b.following))
        parting = parting or _parting(index, a, b)
        progress(len(window))
    one, other = (np.concatenate(side) for side in zip(*losses, strict=True))
    perplexities = metrics.perplexity(one), metrics.perplexity(other)
    moved = [b * perplexities[1] - a * perplexities[0] for a, b in losses]  # what a token does to the difference
    return Difference(
        *_divergences(parts), float(np.concatenate(equal).mean()), standard_error(equal),
        *perplexities, perplexities[1] - perplexities[0], standard_error(moved), parting,
    )  # fmt: skip


def _divergences(parts: list[Divergence]) -> tuple:
    """Fields of Difference up to `covered`."""
    kl = [part.kl for part in parts]
    every, ends = np.concatenate(kl), np.cumsum(list(map(len, kl)))
    worst = int(every.argmax())
    window = int(np.searchsorted(ends, worst, "right"))
    place = window, worst - int(ends[window] - len(kl[window]))
    mean, p99 = float(every.mean()), float(np.percentile(every, metrics.PERCENTILE))
    covered = float(np.concatenate([part.covered for part in parts]).mean())
    whole = all(part.whole for part in parts)
    return len(every), mean, standard_error(kl), p99, float(every.max()), place, whole, covered


def _pairs(first: Source, second: Source, windows: list[np.ndarray]) -> Iterator[tuple[Rows, Rows]]:
    sizes = first.vocab_size, second.vocab_size
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValidationError(f"{first.name} has {sizes[0]} tokens in its vocabulary, {second.name} has {sizes[1]}")
    return zip(first.rows(windows), second.rows(windows), strict=True)


def _parting(index: int, a: Rows, b: Rows) -> Parting | None:
    apart = np.flatnonzero(a.best != b.best)
    if not len(apart):
        return None
    row = int(apart[0])
    best, other = int(a.best[row]), int(b.best[row])
    place = other if a.ids is None else next(iter(np.flatnonzero(a.ids[row] == other)), None)
    margin = None if place is None else float(a.logprobs[row].max() - a.logprobs[row, place])
    return Parting(index, row, best, other, margin)
