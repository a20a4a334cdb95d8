"""Runs one part of an engine through the script: its tensors for all rows, and what its cache held after every step."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from latentrt.validation.bisect.parts import ANGLES, OTHER_TERM, Part
from latentrt.validation.bisect.runners import Runner
from latentrt.validation.bisect.script import Script, Step


@dataclass
class Replay:
    """Tensors [T, ...] by tap, in the script's rows. `written`: every row's cell after the step that wrote it; `left`: the
    same cells in the end, [T, width]."""

    taps: dict[str, Tensor]
    written: Tensor | None = None
    left: Tensor | None = None
    cells: list[Tensor] = field(default_factory=list)


def replay(runner: Runner, part: Part, script: Script, given: Mapping[str, np.ndarray]) -> Replay:
    """`given`: [T, ...] of all rows, for the inputs of `part.given`. Weights of the part are let go of in the end."""
    call, rows = runner.open(part), len(script.tokens)
    cache = runner.empty_cache(script.num_pages) if part.cache else None
    found: dict[str, Tensor] = {}
    result = Replay(found)
    cells = np.concatenate([script.cells(s) for s in script.sequences])
    for step in script.steps:
        values, cache = call(_feeds(runner, part, step, given), cache)
        for tap, name in part.taps.items():
            value = torch.from_numpy(np.array(values[name]))
            value = value.double() if value.is_floating_point() else value
            at = step.rows if len(value) == len(step.rows) else step.rows[step.batch.logit_rows]
            if tap not in found:
                fill = torch.nan if value.is_floating_point() else -1
                found[tap] = torch.full((rows, *value.shape[1:]), fill, dtype=value.dtype)
            found[tap][at] = value
        if part.cache:
            held = runner.rows(cache)
            if result.written is None:
                result.written = torch.zeros(rows, held.shape[-1], dtype=held.dtype)
            result.written[step.rows] = held[cells[step.rows]]
    if part.cache:
        result.left = runner.rows(cache)[cells]
    return result


@dataclass(frozen=True)
class Captured:
    """Inputs of one step by name but the cache, and the cache's cells before it, [num_pages * page_size, width]."""

    feeds: Mapping[str, np.ndarray]
    before: Tensor | None


def capture(runner: Runner, part: Part, script: Script, given: Mapping[str, np.ndarray], number: int) -> Captured:
    """What a part gets in a step of the script, after the steps before it."""
    call = runner.open(part)
    cache = runner.empty_cache(script.num_pages) if part.cache else None
    for step in script.steps[:number]:
        _, cache = call(_feeds(runner, part, step, given), cache)
    before = runner.rows(cache) if part.cache else None
    return Captured(_feeds(runner, part, script.steps[number], given), before)


def _feeds(runner: Runner, part: Part, step: Step, given: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    feeds = {name: value[step.rows] for name, value in given.items()}
    if OTHER_TERM in part.given:
        (edge,) = (v for n, v in feeds.items() if n not in ANGLES)
        feeds[OTHER_TERM] = np.zeros_like(edge)
    return runner.feeds(part, step.batch, feeds)
