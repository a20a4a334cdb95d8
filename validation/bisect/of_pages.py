"""Hypotheses of pages: written to the wrong place or not at all, or read from another page, or as they were before."""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from latentrt.validation.bisect import hypotheses, tensors
from latentrt.validation.bisect.case import LayerCase
from latentrt.validation.bisect.of_attention import ATTENDED, behind
from latentrt.validation.bisect.of_values import Predictions
from latentrt.validation.bisect.script import Script
from latentrt.validation.reference import layer as formula

SWAPPED, STALE, UNWRITTEN = "pages swapped", "stale page", "page not written"


def written(case: LayerCase, tap: str) -> Predictions:
    """Cells hold other tokens than they should: those of an earlier sequence, those of another page, or none."""
    if not tap.startswith("cached"):
        return
    script, first = case.s.script, len(case.s.script.tokens) - len(case.judged(tap, case.found))
    found, whole = case.judged(tap, case.found), case.emulated[0][tap].flatten(1)
    off = hypotheses.affected(case, tap)
    rows, cells = torch.nonzero(off).flatten() + first, torch.from_numpy(_cells(script))
    told = "" if tap == tensors.END else hypotheses.rows_in_words(case, off)
    if not torch.isfinite(found[off]).any():
        yield UNWRITTEN, f"what was to be written to page {_pages(script, cells[rows])} is not there{told}", found
        return
    for kind, words, sources in _other_contents(script, cells[rows]):
        known = sources >= 0
        predicted = whole[first:].clone()
        predicted[rows[known] - first] = whole[sources[known]]
        predicted[rows[~known] - first] = torch.nan
        yield kind, f"{words}{told}", predicted


def _other_contents(script: Script, cells: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    """(kind, words, for every cell the row of the token that it might hold instead, -1: none)."""
    size, last = script.page_size, torch.from_numpy(script.held[-1])
    yield STALE, f"page {_pages(script, cells)} still holds the tokens of an earlier sequence", torch.from_numpy(
        script.forgotten)[cells]  # fmt: skip
    for a, b in combinations(range(1, script.num_pages), 2):
        swapped = torch.where(cells // size == a, cells + (b - a) * size, torch.where(cells // size == b, cells + (a - b) * size, -1))
        if (swapped >= 0).any():
            other = torch.where(swapped >= 0, last[swapped.clamp_min(0)], last[cells])
            yield SWAPPED, f"pages {a} and {b} hold each other's tokens", other


def _cells(script: Script) -> np.ndarray:
    return np.concatenate([script.cells(s) for s in script.sequences])


def _pages(script: Script, cells: Tensor) -> str:
    return ", ".join(str(page) for page in (cells // script.page_size).unique().tolist())


def read(case: LayerCase, tap: str) -> Predictions:
    """Attention of one sequence through another block table, or over a page as it was earlier."""
    if tap not in ATTENDED:
        return
    off, right = hypotheses.affected(case, tap), case.judged(tap, case.emulated[0])
    base = case.emulation().attention(case.rows)
    for number, sequence in enumerate(case.s.script.sequences):
        own = torch.zeros_like(off)
        own[sequence.rows] = off[sequence.rows]
        if own.any():
            told = hypotheses.rows_in_words(case, own)
            for kind, words, table, before in _other_tables(case.s.script, number):
                predicted = _over(case, tap, base, number, table, before, own)
                yield kind, f"{words}, as sequence {number} reads it{told}", hypotheses.where_affected(own, predicted, right)


def _other_tables(script: Script, number: int) -> Iterator[tuple[str, str, np.ndarray, int]]:
    """(kind, words, pages of the sequence, the page that is read as before it was written; -1: none)."""
    own = script.sequences[number].pages
    for page in own:
        yield STALE, f"page {page} is read as an earlier sequence left it", own, int(page)
    for a, b in combinations(range(len(own)), 2):
        table = own.copy()
        table[[a, b]] = own[[b, a]]
        yield SWAPPED, f"pages {own[a]} and {own[b]} are swapped", table, -1
    for a, page in enumerate(own):
        for other in sorted(set(range(1, script.num_pages)) - set(own.tolist())):
            table = own.copy()
            table[a] = other
            yield SWAPPED, f"page {other} of another sequence is read for page {page}", table, -1


def _over(case: LayerCase, tap: str, base: dict, number: int, table: np.ndarray, before: int, wanted: Tensor) -> Tensor:
    """The tensor [T, width] where the sequence reads these pages, step by step as they were filled."""
    script, layer = case.s.script, case.emulation()
    sequence, size, attended = script.sequences[number], script.page_size, base["attended"].clone()
    position = np.arange(len(sequence.tokens))
    cells = table[position // size] * size + position % size
    for k, step in enumerate(script.steps):
        rows = torch.from_numpy(step.rows[(step.rows >= sequence.rows.start) & (step.rows < sequence.rows.stop)])
        if not len(rows) or not wanted[rows].any():
            continue
        past, held = int(rows[0]) - sequence.rows.start, script.held[k]
        if before >= 0:
            held = np.where(np.arange(len(held)) // size == before, script.forgotten, held)
        source = torch.from_numpy(held[cells[: past + len(rows)]])
        keys = [base[name][source.clamp_min(0)].where(source[:, None] >= 0, torch.nan) for name in ("cached latent", "cached k_pe")]
        queries = base["q_latent"][rows], base["q_pe"][rows]
        attended[rows] = layer.math.keep(formula.attend(layer.math, *queries, *keys, case.s.config.softmax_scale, past=past))
    return behind(layer, tap, attended)
