"""How near is near enough, and what is said of a transformers that is not."""

from dataclasses import dataclass

import numpy as np
import transformers

from latentrt.validation.errors import ReferenceRefused

TOLERANCE = 2e-4  # largest difference over the RMS of the output: float32 rounding reaches 2e-6, a wrong rule 1e-2 and more
NOTICEABLE = 1e-3  # a rule that moves the output by less does not matter for this config
_ADVICE = {
    "mscale_squared": "transformers has it since pull request 47435: install transformers 5.23.0 or newer",
    "norm_topk_prob": "transformers ignores norm_topk_prob (5.23.0): no release computes this config",
    "scoring_func": "transformers knows softmax only (5.23.0): no release computes this config",
    "moe_layer_freq": "transformers ignores moe_layer_freq (5.23.0): no release computes this config",
    "mscale": "set both mscale and mscale_all_dim in config.json to what the model was trained with",
}  # fmt: skip
_PASSING = "5.23.0"  # a release that passes
DEFAULT_ADVICE = (
    f"install transformers {_PASSING}, which passes this audit"
    if transformers.__version__ != _PASSING
    else "this is no known fault of this release, so nothing can be compared with it: report the config.json"
)


@dataclass(frozen=True)
class AuditCheck:
    """One rule: `error` of the reference against the formula, and how far the output would be off with the rule broken."""

    name: str
    error: float
    if_broken: float | None  # None: the config leaves nothing to break
    detail: str = ""


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the RMS of what is expected; infinite if something is not finite."""
    error = np.abs(found - expected).max() / (np.sqrt((expected**2).mean()) + 1e-30)
    return float(error) if np.isfinite(error) else float("inf")


def refuse(finding: str, field: str) -> None:
    """Raises ReferenceRefused with the finding, and what to do about the config's `field` ("" for any)."""
    raise ReferenceRefused(
        f"transformers {transformers.__version__} fails the reference audit: {finding}; {_ADVICE.get(field, DEFAULT_ADVICE)}"
    )
