"""Numbers that compare two models' outputs. All are computed in float64; logits are natural-log scores, so KL is in nats."""

from dataclasses import dataclass, field

import numpy as np

PERCENTILE = 99


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis, float64; unchanged by a shift of a row."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl_divergence(reference: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL(reference || found) of the next-token distributions, nats. Logits [T, V] -> [T]; never below 0."""
    p, q = log_softmax(reference), log_softmax(found)
    return np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)


def max_abs_error(reference: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Largest |found - reference| per row, in the unit of the values. [T, V] -> [T]; infinite where not finite."""
    error = np.abs(np.asarray(found, np.float64) - np.asarray(reference, np.float64)).max(-1)
    return np.where(np.isfinite(error), error, np.inf)


def relative_error(reference: np.ndarray, found: np.ndarray) -> float:
    """|found - reference| / |reference|, Euclidean norms over everything; infinite where not finite, 0 for equal zeros."""
    reference, found = np.asarray(reference, np.float64), np.asarray(found, np.float64)
    difference, size = np.linalg.norm(found - reference), np.linalg.norm(reference)
    if not np.isfinite(difference):
        return float("inf")
    return float(difference / size) if size else float(0.0 if difference == 0 else np.inf)


def largest_row_error(reference: np.ndarray, found: np.ndarray) -> float:
    """The largest relative error of a row: what is wrong for a few tokens shows. Rows far below the usual size count as that.

    [T, D] both; the usual size is a tenth of the root mean square of the rows' norms. Infinite where not finite.
    """
    reference, found = np.asarray(reference, np.float64), np.asarray(found, np.float64)
    errors, sizes = np.linalg.norm(found - reference, axis=-1), np.linalg.norm(reference, axis=-1)
    if not np.isfinite(errors).all():
        return float("inf")
    least = 0.1 * np.sqrt((sizes**2).mean())
    return float((errors / np.maximum(sizes, least or 1.0)).max())


def cosine(reference: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Cosine similarity per row. [T, V] -> [T], in -1 .. 1; NaN where a row is zero or not finite."""
    reference, found = np.asarray(reference, np.float64), np.asarray(found, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        product = (reference * found).sum(-1) / (np.linalg.norm(reference, axis=-1) * np.linalg.norm(found, axis=-1))
    return np.clip(product, -1.0, 1.0)


def top1_equal(reference: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Whether the most likely token is the same. [T, V] -> [T] bool."""
    return np.asarray(reference).argmax(-1) == np.asarray(found).argmax(-1)


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log p(target), nats. Logits [T, V] and token ids [T] -> [T]."""
    return -np.take_along_axis(log_softmax(logits), np.asarray(targets, np.int64)[:, None], -1)[:, 0]


def perplexity(nll: np.ndarray) -> float:
    """exp of the mean negative log-likelihood [T]."""
    return float(np.exp(np.mean(nll))) if len(nll) else float("nan")


@dataclass
class LogitComparison:
    """Accumulates a comparison of logits, window after window, so that one window's logits are in memory at a time."""

    errors: list[np.ndarray] = field(default_factory=list)  # each [T]
    kl: list[np.ndarray] = field(default_factory=list)
    equal: list[np.ndarray] = field(default_factory=list)
    cosines: list[np.ndarray] = field(default_factory=list)
    squares: list[tuple[float, float]] = field(default_factory=list)  # sums of (difference^2, reference^2)

    def add(self, reference: np.ndarray, found: np.ndarray) -> np.ndarray:
        """Adds the rows of logits [T, V] of both; returns the largest error of each row [T]."""
        self.errors.append(max_abs_error(reference, found))
        self.kl.append(kl_divergence(reference, found) if np.isfinite(found).all() else np.full(len(found), np.inf))
        self.equal.append(top1_equal(reference, found))
        self.cosines.append(cosine(reference, found))
        difference = np.asarray(found, np.float64) - reference
        self.squares.append((float((difference**2).sum()), float((np.asarray(reference, np.float64) ** 2).sum())))
        return self.errors[-1]

    def summary(self) -> dict[str, float | int]:
        """Over all tokens: largest error and its mean, relative error, lowest cosine, KL (mean, p99, max), top-1 agreement."""
        errors, kl = np.concatenate(self.errors), np.concatenate(self.kl)
        difference, size = np.array(self.squares).sum(0)
        return {
            "tokens": len(errors),
            "max_abs_error": float(errors.max()),
            "mean_max_abs_error": float(errors.mean()),
            "relative_error": float(np.sqrt(difference / size)) if size else 0.0,
            "cosine_min": float(np.concatenate(self.cosines).min()),
            "kl_mean": float(kl.mean()),
            "kl_p99": float(np.percentile(kl, PERCENTILE)),
            "kl_max": float(kl.max()),
            "top1_agreement": float(np.concatenate(self.equal).mean()),
        }
