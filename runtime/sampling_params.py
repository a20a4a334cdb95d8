"""What a request may ask of the sampler. Imports no package: `import runtime` is at hand at once."""

import math
from dataclasses import dataclass
from numbers import Integral, Real

from latentrt.runtime.errors import RequestError

GREEDY = 0.0


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is sampled and when it ends. Raises RequestError for a value that is not accepted.

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off; seed None draws a fresh one.
    `stop` strings are cut from the text. The answer ends at an end-of-sequence token unless `ignore_eos`.
    """

    temperature: float = GREEDY
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_new_tokens: int = 64  # tokens
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        _check_real("temperature", self.temperature, "0 (greedy) or more", lambda v: v >= 0)
        _check_integer("top_k", self.top_k, 0, "0 (off) or more")
        _check_real("top_p", self.top_p, "above 0, at most 1 (off)", lambda v: 0 < v <= 1)
        _check_real("min_p", self.min_p, "0 (off) to 1", lambda v: 0 <= v <= 1)
        _check_real("repetition_penalty", self.repetition_penalty, "above 0 (1 is off)", lambda v: v > 0)
        _check_integer("max_new_tokens", self.max_new_tokens, 1, "1 or more")
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, "0 or more, or None for a fresh one")
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {self.ignore_eos!r}, accepted: True or False")


def _stop_strings(stop) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    for string in strings:
        if not isinstance(string, str) or not string:
            raise RequestError(f"stop has {string!r}, accepted: strings of one character or more")
    return strings


def _check_real(name: str, value, accepted: str, accepts) -> None:
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not accepts(value):
        raise RequestError(f"{name} is {value!r}, accepted: a number, {accepted}")


def _check_integer(name: str, value, smallest: int, accepted: str) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < smallest:
        raise RequestError(f"{name} is {value!r}, accepted: an integer, {accepted}")
