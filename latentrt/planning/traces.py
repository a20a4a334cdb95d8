"""Requests that a simulation serves: read from a file of JSON lines, or drawn from a seed."""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from latentrt.errors import UserError


@dataclass(frozen=True)
class Request:
    """arrival: seconds. `name` tells it from others in errors."""

    arrival: float
    prompt_tokens: int
    answer_tokens: int
    name: str = ""

    @property
    def tokens(self) -> int:
        """Of prompt and answer."""
        return self.prompt_tokens + self.answer_tokens


_ACCEPTED = {"arrival": "seconds, 0 or more", "prompt_tokens": "1 or more", "answer_tokens": "1 or more"}


def read(path: Path) -> list[Request]:
    """Requests of a file, a JSON object a line, in the order of arrival. UserError names file and line."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"--trace: {path} cannot be read ({reason})") from None
    found = [_parsed(line, f"{path}:{number}") for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not found:
        raise UserError(f"--trace: {path} has no requests, accepted: one line or more of {_example()}")
    return sorted(found, key=lambda request: request.arrival)


def _parsed(line: str, where: str) -> Request:
    try:
        found = json.loads(line)
    except ValueError:
        raise UserError(f"{where}: not valid JSON, accepted: {_example()}") from None
    if not isinstance(found, dict) or found.keys() != _ACCEPTED.keys():
        seen = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise UserError(f"{where}: found {seen or 'no fields'}, accepted: {_example()}")
    for field in fields(Request)[:3]:
        value, whole = found[field.name], field.name != "arrival"
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < whole:
            raise UserError(f"{where}: {field.name} is {value!r}, accepted: {_ACCEPTED[field.name]}")
    return Request(**found, name=where)


def _example() -> str:
    return '{"arrival": 0.5, "prompt_tokens": 1024, "answer_tokens": 256}'


def draw(count: int, prompt: int, answer: int, rate: float | None = None, spread: float = 0.5, seed: int = 0) -> list[Request]:
    """`count` requests with lengths from mean x (1 - spread) to mean x (1 + spread), all equally likely.

    rate: of a Poisson process, requests a second; None: all arrive at once.
    """
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(1 / rate, count)) if rate else np.zeros(count)
    lengths = [random.integers(max(1, round(n * (1 - spread))), round(n * (1 + spread)) + 1, count) for n in (prompt, answer)]
    return [
        Request(float(when), int(asked), int(told), f"drawn request {number}")
        for number, (when, asked, told) in enumerate(zip(arrivals, *lengths, strict=True), 1)
    ]
