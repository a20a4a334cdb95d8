"""What could have made a wrong tensor what it is: each hypothesis is the tensor that it predicts, and words.

Predictions have the engine's roundings in them, so that the right one leaves little: of int4's 10 % nothing. Hypotheses about
some tokens only (decode steps, one sequence) predict these, and the right values of all others.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentrt.validation.bisect.case import LayerCase

FITS = 0.25  # of the error may be left, in Euclidean length: 94 % of its square is explained


@dataclass(frozen=True)
class Hypothesis:
    """`left`: the part of the error that it does not explain. module: where the cause is, if not where it shows."""

    kind: str
    words: str
    left: float
    module: str = ""

    @property
    def fits(self) -> bool:
        return self.left <= FITS


Source = Callable[[LayerCase, str], Iterator[tuple[str, str, Tensor]]]


def judged(case: LayerCase, tap: str, sources: Mapping[Source, str], limit: float) -> list[Hypothesis]:
    """What `sources` (with the module that each speaks of) say of a tensor, the best first. The first that leaves a tenth of
    the tolerance `limit` ends the search."""
    right, found = case.judged(tap, case.emulated[0]), case.judged(tap, case.found)
    usual = [case.judged(tap, e) for e in case.emulated[1:]]
    enough = max([limit, *(float((u - right).norm() / (right.norm() + 1e-300)) for u in usual)])
    error = max(size(found, right), 1e-300)
    result = []
    for source, module in sources.items():
        for kind, words, predicted in source(case, tap):
            rest = size(found, predicted.flatten(1)[-len(found) :])
            small = rest <= 0.1 * enough * float(right.norm())
            result.append(Hypothesis(kind, words, 0.0 if small and rest < FITS * error else rest / error, module))
            if not result[-1].left:
                return [result[-1], *sorted(result[:-1], key=lambda h: h.left)]
    return sorted(result, key=lambda h: h.left)


def size(found: Tensor, predicted: Tensor) -> float:
    """Euclidean length of the difference; where only one of both is a number, it is the size of the largest of all."""
    numbers = torch.isfinite(found), torch.isfinite(predicted)
    both, one = numbers[0] & numbers[1], numbers[0] ^ numbers[1]
    largest = torch.cat([found[numbers[0]], predicted[numbers[1]]]).abs().max() if any(n.any() for n in numbers) else 1.0
    return float((found - predicted).where(both, one * 10.0 * largest).norm())


def affected(case: LayerCase, tap: str) -> Tensor:
    """[T] rows that are off by more than roundings make them: by half of what they cost where the other rows are as the
    emulation has them, by up to four times that where none is."""
    right, found, exact = (case.judged(tap, values) for values in (case.emulated[0], case.found, case.exact))
    errors, usual = (found - right).norm(dim=1).nan_to_num(torch.inf), (right - exact).norm(dim=1)
    ratio = errors / torch.maximum(usual, 0.1 * usual.square().mean().sqrt()).clamp_min(1e-300)
    return ratio > (4 * ratio.median()).clamp(0.5, 4)


def where_affected(rows: Tensor, predicted: Tensor, right: Tensor) -> Tensor:
    """`predicted` in the affected rows."""
    return torch.where(rows[:, None], predicted.flatten(1), right.flatten(1))


def rows_in_words(case: LayerCase, rows: Tensor) -> str:
    """Which tokens are affected: all, those of decode steps, of some sequences, or how many."""
    if rows.all():
        return ""
    owners = [k for k, s in enumerate(case.s.script.sequences) if rows[s.rows].any()]
    decoding = torch.zeros_like(rows)
    for step in case.s.script.steps:
        alone = np.repeat(np.diff(step.batch.query_starts) == 1, np.diff(step.batch.query_starts))
        decoding[torch.from_numpy(step.rows[alone])] = True
    if not (rows & ~decoding).any():
        return ", in decode steps only"
    some = f", in {int(rows.sum())} of {len(rows)} tokens"
    return some + (f" (of sequence {owners[0]})" if len(owners) == 1 else "")
