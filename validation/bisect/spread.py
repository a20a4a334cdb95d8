"""How far is a tensor off, and how far may it be? Found errors against those of the engine's roundings, emulated.

Errors are relative and Euclidean: of each row (a token), of each column (a channel, which one wrong scale spoils), and of all.
Rows and columns far below the usual size count as a tenth of that. Emulated errors are a sample of what a right engine has.
Their logarithms are taken for normally distributed above the median, so that the largest of n may lie z deviations beyond it,
z being the quantile that all n of a right engine stay below but for once in a million. All limits are doubled: an emulation
knows which numbers are rounded, not how often on the way; four times as many roundings of a size double an error.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

DOUBT, MISTAKES = 2.0, 1e-6
_AXES = ("row", "column")
_AGREED = 0.5  # of the expected error is the most that agreeing emulations differ by
_HIGH = 0.95  # the quantile that the deviation is taken from


@dataclass(frozen=True)
class Error:
    """Relative errors: of the whole, and the largest of a row and of a column."""

    whole: float
    row: float
    column: float
    worst_row: int = 0
    worst_column: int = 0


@dataclass(frozen=True)
class Spread:
    """A tensor's found error, what the emulation's roundings cost, and how far a right engine can be off.

    unexplained: how far the found tensor is from the emulated one, over the expected error: where an engine rounds in the very
    places of the emulation it is nearly 0, in others up to 1.4. No verdict depends on it, but what is off later is traced back
    to the first tensor that `strays`. undecided: the same of another emulation, whose sums have other noise.
    """

    found: Error
    expected: Error
    limit: Error
    unexplained: float = 0.0
    undecided: float = 0.0

    @property
    def strays(self) -> bool:
        """Whether it is farther from the emulation than all roundings together, where emulations agree."""
        return self.unexplained > 1 and self.undecided < _AGREED

    @property
    def ratio(self) -> float:
        """The largest of found / limit: beyond 1 it is no rounding."""
        pairs = ((getattr(self.found, k), getattr(self.limit, k)) for k in ("whole", *_AXES))
        return max(found / limit if limit else (0.0 if found == 0 else np.inf) for found, limit in pairs)

    @property
    def passes(self) -> bool:
        return self.ratio <= 1  # NaN does not


def compare(exact: Tensor, found: Tensor, emulated: list[Tensor]) -> Spread:
    """[T, ...] each, float64."""
    exact, found, *emulated = (t.reshape(len(t), -1) for t in (exact, found, *emulated))
    errors = _errors(exact, found)
    samples = [_errors(exact, e) for e in emulated]
    whole = max(s["whole"] for s in samples)
    top = {axis: max(float(s[axis].max()) for s in samples) for axis in _AXES}
    limits = {axis: _top([s[axis] for s in samples]) for axis in _AXES}
    largest = {axis: int(errors[axis].nan_to_num(torch.inf).argmax()) for axis in _AXES}
    return Spread(
        Error(errors["whole"], *(float(errors[a][largest[a]]) for a in _AXES), *(largest[a] for a in _AXES)),
        Error(whole, *(top[a] for a in _AXES)),
        Error(DOUBT * whole, *(DOUBT * limits[a] for a in _AXES)),
        *(float((t - emulated[0]).norm() / (emulated[0] - exact).norm().clamp_min(1e-300)) for t in (found, emulated[-1])),
    )


def distance(exact: Tensor, found: Tensor) -> float:
    """Relative error of the whole, infinite where not finite."""
    value = float((found - exact).norm() / (exact.norm() + 1e-300))
    return value if np.isfinite(value) else np.inf


def _errors(exact: Tensor, found: Tensor) -> dict:
    difference = (found - exact).double()
    parts = {"row": _along(exact, difference, 1), "column": _along(exact, difference, 0)}
    return parts | {"whole": distance(exact, found)}


def _along(exact: Tensor, difference: Tensor, axis: int) -> Tensor:
    sizes, errors = exact.norm(dim=axis), difference.norm(dim=axis)
    least = 0.1 * sizes.square().mean().sqrt()
    return (errors / sizes.clamp_min(float(least) or 1.0)).nan_to_num(torch.inf)


def _top(samples: list[Tensor]) -> float:
    errors = torch.cat(samples)
    return max(largest(errors), float(errors.max()))


def largest(errors: Tensor) -> float:
    """The largest that so many errors [n] of this distribution come to; a few that are of another kind do not matter."""
    logs = errors[errors > 0].log()
    if len(logs) < 2:
        return float(errors.max())
    z, middle = NormalDist().inv_cdf((1 - MISTAKES) ** (1 / len(errors))), logs.median()
    deviation = (logs.quantile(_HIGH) - middle) / NormalDist().inv_cdf(_HIGH)
    return float((middle + z * deviation).exp())
