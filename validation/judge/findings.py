"""What a validation found: the checks that make the verdict, and all numbers behind them. Serializable as JSON."""

import math
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

import numpy as np

from latentrt.validation.judge.tolerances import Tolerance


@dataclass(frozen=True)
class Check:
    """One line of the verdict. `stage` says where; `detail` names the first place that is off; expected: what the emulation of
    the target's roundings has."""

    name: str
    stage: str
    value: float
    limit: float | None
    sense: str
    reason: str
    passed: bool
    detail: str = ""
    expected: float | None = None


@dataclass
class LayerErrors:
    """Relative (Euclidean) errors of one layer against the reference: running free, with the reference's routing, and with
    the reference's layer input as well (isolated, so that errors of earlier layers do not count). The last two are of the
    worst token of what attention and MLP or MoE block add to the residual, isolated: a wrong expert meets few tokens."""

    layer: int
    is_moe: bool
    attention_free: float
    hidden_free: float
    hidden_routed: float
    attention_isolated: float
    hidden_isolated: float
    attention_token: float
    mlp_token: float


@dataclass
class Findings:
    """Everything that is reported. `series` holds per-token numbers for the plots, and is left out of the evidence."""

    checks: list[Check] = field(default_factory=list)
    audit: list[dict] = field(default_factory=list)
    tolerances: str = ""
    executed: dict[str, Any] = field(default_factory=dict)  # Executor.describe
    text: dict[str, Any] = field(default_factory=dict)
    weights: list[dict] = field(default_factory=list)
    logits: dict[str, dict[str, dict]] = field(default_factory=dict)  # stage -> mode -> metrics.LogitComparison.summary
    layers: dict[str, list[LayerErrors]] = field(default_factory=dict)  # by stage
    traced: dict[str, dict[str, float]] = field(default_factory=dict)  # by stage: logit errors free, routed, isolated
    alone: dict[str, list[dict]] = field(default_factory=dict)  # by stage: calibration.expected.LayerSpread
    routing: dict[str, list[dict]] = field(default_factory=dict)  # by stage
    fidelity: dict[str, float] = field(default_factory=dict)
    perplexity: dict[str, float] = field(default_factory=dict)
    greedy: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    series: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(c.passed for c in self.checks)

    @property
    def first_failure(self) -> Check | None:
        """The first failed check in the order of the data's way."""
        return next((c for c in self.checks if not c.passed), None)

    def judge(self, name: str, stage: str, value: float, tolerance: Tolerance, detail: str = "") -> None:
        """Adds a check."""
        t = tolerance
        self.checks.append(Check(name, stage, value, t.limit, t.sense, t.reason, t.passes(value), detail, t.expected))


def plain(value: Any) -> Any:
    """`value` in terms of JSON: dataclasses, arrays and NumPy numbers become plain ones; inf and NaN become strings."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
