"""Logits of an engine and of its emulation, each against the same reference on the same tokens: is the engine's error of a size
that its roundings have?

All limits come from the emulation. An engine may round a number DOUBT times where the emulation does once: that makes the
square of its errors, and so KL, DOUBT times as large. Means get the standard errors that the emulated ones have, times the
quantile that a right engine exceeds once in 1 / MISTAKES.
"""

from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
import torch

from latentrt.validation.bisect.spread import DOUBT, MISTAKES, largest
from latentrt.validation.judge import metrics
from latentrt.validation.judge.findings import Findings
from latentrt.validation.judge.statistics import paired_test, standard_error
from latentrt.validation.judge.tolerances import Tolerance

QUANTILE = NormalDist().inv_cdf(1 - MISTAKES / 2)
KL_REASON = (
    f"{DOUBT:g} times what the target's own roundings, emulated, make of the same tokens: {DOUBT:g} roundings for each; "
    f"and {QUANTILE:.2f} standard errors"
)
TOP1_REASON = (
    f"exact paired test: a right engine, which parts from the reference {DOUBT:g} times as often as the emulation at most, "
    "fails once in a million"
)
LOSS_REASON = f"{DOUBT:g} times what the emulated roundings change, and {DOUBT * QUANTILE:.2f} of its standard errors"


@dataclass
class Side:
    """Of one side, window by window: KL to the reference, whether the first choice is the same, and the change of -log p."""

    kl: list[np.ndarray] = field(default_factory=list)
    equal: list[np.ndarray] = field(default_factory=list)
    change: list[np.ndarray] = field(default_factory=list)

    def add(self, kl: np.ndarray, equal: np.ndarray, change: np.ndarray, used: slice) -> None:
        """used: which tokens of the window count."""
        self.kl.append(np.nan_to_num(kl[used], nan=np.inf))
        self.equal.append(equal[used])
        self.change.append(change[used])

    @property
    def mean_kl(self) -> float:
        return _mean(self.kl)[0]


@dataclass
class Paired:
    """Gathers windows of both."""

    found: Side = field(default_factory=Side)
    emulated: Side = field(default_factory=Side)

    def add(self, window: np.ndarray, reference: np.ndarray, found: np.ndarray, emulated: np.ndarray, used: slice) -> None:
        """Logits [T, vocab_size] of window [T]; used: which tokens count, see judge/excuse.py."""
        loss = metrics.negative_log_likelihood(reference[:-1], window[1:])
        for side, logits in ((self.found, found), (self.emulated, emulated)):
            change = metrics.negative_log_likelihood(logits[:-1], window[1:]) - loss
            side.add(metrics.kl_divergence(reference, logits), metrics.top1_equal(reference, logits), change, used)

    def judge_kl(self, findings: Findings, name: str, stage: str) -> None:
        """Mean KL to the reference."""
        findings.judge(name, stage, self.found.mean_kl, self.kl_tolerance())

    def kl_ratio(self) -> float:
        """Of its limit; infinite for NaN."""
        ratio = self.found.mean_kl / (self.kl_tolerance().limit or 1e-300)
        return ratio if ratio == ratio else np.inf

    def kl_tolerance(self) -> Tolerance:
        """For the mean KL."""
        mean, error = _mean(self.emulated.kl)
        return Tolerance(DOUBT * (mean + QUANTILE * error), KL_REASON, expected=mean)

    def judge_top1(self, findings: Findings, name: str, stage: str) -> None:
        """How often the likeliest token is the reference's, and how likely that is of a right engine."""
        off, other = (~np.concatenate(side.equal) for side in (self.found, self.emulated))
        told = Tolerance(None, "judged by the paired test below", expected=_mean(self.emulated.equal)[0])
        findings.judge(f"{name}: agreement", stage, _mean(self.found.equal)[0], told)
        chance = paired_test(off, other, DOUBT)
        detail = (
            f"{off.sum()} of {len(off)} tokens have another first choice, {other.sum()} in the emulation; "
            f"{(off & ~other).sum()} here alone, {(other & ~off).sum()} there alone"
        )
        findings.judge(f"{name}: chance of so many others", stage, chance, Tolerance(MISTAKES, TOP1_REASON, ">="), detail)

    def judge_losses(self, findings: Findings, name: str, stage: str) -> None:
        """The change of perplexity."""
        mean, error = _mean(self.emulated.change)
        limit = float(np.expm1(DOUBT * (abs(mean) + QUANTILE * error)))
        value = abs(float(np.expm1(_mean(self.found.change)[0])))
        findings.judge(name, stage, value, Tolerance(limit, LOSS_REASON, expected=abs(float(np.expm1(mean)))))


def _mean(windows: list[np.ndarray]) -> tuple[float, float]:
    """And its standard error, the larger of two: of blocks of tokens, and of tokens, since few blocks say little."""
    values = np.concatenate(windows)
    if not len(values):
        return 0.0, 0.0
    alone = float(values.std() / max(1, len(values) - 1) ** 0.5)
    return float(values.mean()), float(np.nanmax([standard_error(windows), alone]))


def largest_error(errors: list[np.ndarray]) -> Tolerance:
    """For the largest error of a logit, from the emulated ones of each token. A few tokens that flip do not matter."""
    every = np.concatenate(errors)
    reason = f"{DOUBT:g} times the largest that the emulated errors of so many tokens come to, once in a million"
    return Tolerance(DOUBT * largest(torch.from_numpy(every)), reason, expected=float(np.max(every)))
