"""Means over the tokens of a text, with errors that know that neighbours are alike; and a paired test of two counts."""

from collections.abc import Iterable
from math import exp, lgamma, log, log1p

import numpy as np

BLOCK = 32  # tokens that are taken for one sample


def standard_error(windows: Iterable[np.ndarray]) -> float:
    """Of the mean of all values [T] of all windows, from the means of blocks of BLOCK neighbours; NaN with one block only."""
    blocks = [part for values in windows for part in np.split(values, range(BLOCK, len(values), BLOCK))]
    if len(blocks) < 2:
        return float("nan")
    count, mean = sum(map(len, blocks)), np.concatenate(blocks).mean()
    off = np.array([(part - mean).sum() for part in blocks])
    return float(np.sqrt((off**2).sum() * len(blocks) / (len(blocks) - 1)) / count)


def paired_test(found: np.ndarray, other: np.ndarray, ratio: float = 1.0) -> float:
    """How likely `found` errs so often beside `other`, [T] bool each, if it errs at most `ratio` times as often.

    Of the tokens where one of them errs, those where only `found` does are `ratio` / (1 + `ratio`) of all at most, whatever
    share of the errors both have: the tail of that binomial distribution. With ratio 1 it is McNemar's exact test, on the
    safe side.
    """
    tries = int((found | other).sum())
    return binomial_tail(tries, ratio / (1 + ratio), int((found & ~other).sum()))


def binomial_tail(tries: int, chance: float, least: int) -> float:
    """Probability of `least` successes or more."""

    def term(k: int) -> float:
        ways = lgamma(tries + 1) - lgamma(k + 1) - lgamma(tries - k + 1)
        return exp(ways + k * log(chance) + (tries - k) * log1p(-chance))

    return min(1.0, sum(map(term, range(least, tries + 1)))) if least > 0 else 1.0
