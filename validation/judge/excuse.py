"""Rows of logits that a routing flip on a near tie excuses: the token that flipped, and all later ones of its sequence."""

import numpy as np

from latentrt.validation.judge import routing
from latentrt.validation.judge.findings import Findings
from latentrt.validation.judge.tolerances import Tolerance
from latentrt.validation.reference.model import Reference
from latentrt.validation.stages.base import Stage

MOST = 4  # windows that are looked into; more than that is no accident


class Excuses:
    """Looks into windows whose logits are beyond the limit. The tokens are traced in reference and stage."""

    def __init__(self, reference: Reference, stage: Stage, limit: Tolerance, findings: Findings):
        self.reference, self.stage, self.limit, self.findings = reference, stage, limit, findings
        self._first_flip: dict[bytes, int | None] = {}

    def used(self, window: np.ndarray, errors: np.ndarray) -> int:
        """How many first tokens of a window with these errors [T] count: those before a flip that excuses the others."""
        if self.limit.passes(float(errors.max())) or not self.stage.can_trace:
            return len(errors)
        key = window.tobytes()
        if key not in self._first_flip and len(self._first_flip) < MOST:
            self._first_flip[key] = self._flip(window)
        first = self._first_flip.get(key)
        if first is None:
            return len(errors)
        if self.limit.passes(float(errors[:first].max(initial=0.0))):
            note = f"{self.stage.name}: tokens from {first} on of one window are excused: a routing flip on a near tie"
            if note not in self.findings.notes:
                self.findings.notes.append(note)
        return first

    def largest(self, window: np.ndarray, errors: np.ndarray) -> float:
        """The largest of errors [T] that no near tie excuses."""
        return float(errors[: self.used(window, errors)].max(initial=0.0))

    def _flip(self, window: np.ndarray) -> int | None:
        """First token with an explained flip; None if there is no flip, or one that is not explained."""
        reference, found = self.reference.trace(window), self.stage.trace(window)
        flips = [flip for layer in reference.routing for flip in self._compare(layer, reference, found).flips]
        if not flips or not min(flips, key=lambda f: (f.token, f.layer)).explained:
            return None
        return min(f.token for f in flips)

    def _compare(self, layer: int, reference, found) -> routing.LayerRouting:
        gate = self.reference.gate(layer)
        return routing.compare(layer, reference.routing[layer], found.routing[layer], gate, self.reference.config)

    def detail(self, worst: float) -> str:
        """What to say beside a failure."""
        if self.limit.passes(worst):
            return ""
        return "no near tie of the routing explains it; see the layer checks of this stage for the first layer that is off"
