"""What a request may ask of the sampler. Imports no package: `import runtime` is at hand at once."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING

from latentrt.runtime.errors import RequestError

if TYPE_CHECKING:
    from latentrt.runtime.structured import Constraint

GREEDY = 0.0


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is sampled and when it ends. Raises RequestError for a value that is not accepted.

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off; seed None draws a fresh one.
    `stop` strings are cut from the text. The answer ends at an end-of-sequence token unless `ignore_eos`, and always at one
    of `stop_token_ids`; at none of them before `min_new_tokens`. Special tokens have no text if `skip_special_tokens`.
    presence_penalty is subtracted from the logits of tokens in the answer, frequency_penalty as often as they are in it;
    logit_bias, pairs of token and bias, is added.

    logprobs: how many of the likeliest tokens are told beside each token's own log probability; prompt_logprobs: the same
    for the prompt, which is then computed as a whole; None: nothing. constraint: what the answer must follow, see
    runtime/structured.py.
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
    stop_token_ids: tuple[int, ...] = ()
    skip_special_tokens: bool = True
    min_new_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: "Constraint | None" = None

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
        self._check_more()

    def _check_more(self) -> None:
        _check_integer("min_new_tokens", self.min_new_tokens, 0, "0 or more")
        if self.min_new_tokens > self.max_new_tokens:
            longest = f"max_new_tokens, {self.max_new_tokens}"
            raise RequestError(f"min_new_tokens is {self.min_new_tokens}, accepted: up to {longest}")
        for name in ("presence_penalty", "frequency_penalty"):
            _check_real(name, getattr(self, name), "-2 to 2 (0 is off)", lambda v: -2 <= v <= 2)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), 0, "0 or more, or None for none")
        for token in self.stop_token_ids:
            _check_integer("a token in stop_token_ids", token, 0, "0 or more")
        for token, bias in self.logit_bias:
            _check_integer("a token in logit_bias", token, 0, "0 or more")
            _check_real(f"logit_bias of token {token}", bias, "-100 to 100", lambda v: -100 <= v <= 100)
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
