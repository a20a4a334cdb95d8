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
from latentrt.validation.bisect.script import Script, Sequence
from latentrt.validation.reference import layer as formula

SWAPPED, STALE, UNWRITTEN = "pages swapped", "stale page", "page not written"
_EVER, _STEP = 0, 1


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
    predicted, words, kinds = case.emulated[0][tap].flatten(1)[first:].clone(), [], []
    for page in (cells[rows] // script.page_size).unique().tolist():
        own = rows[cells[rows] // script.page_size == page]
        tried = []
        for kind, told_of, sources in _other_contents(script, own, cells[own], page):
            value = whole[sources.clamp_min(0)].where(sources[:, None] >= 0, torch.nan)
            tried.append((hypotheses.size(found[own - first], value), kind, told_of, value))
        _, kind, told_of, value = min(tried, key=lambda t: t[0])
        predicted[own - first] = value
        words.append(told_of)
        kinds.append(kind)
    yield max(kinds, key=kinds.count), f"{'; '.join(words)}{told}", predicted


def _other_contents(script: Script, rows: Tensor, cells: Tensor, page: int) -> Iterator[tuple[str, str, Tensor]]:
    """(kind, words, for every row's cell the row of the token that it may hold instead, -1: none), when its own is due."""
    before = torch.tensor([int(script.before(_owner(script, row))[cell]) for row, cell in zip(rows, cells, strict=True)])
    yield STALE, f"page {page} still holds the tokens of an earlier sequence", before
    for other in range(1, script.num_pages):
        moved = cells + (other - page) * script.page_size
        held = torch.tensor([int(script.held[k][cell]) for k, cell in zip(script.step_of[rows.numpy()], moved, strict=True)])
        words = f"page {page} holds the tokens of page {other}"
        yield SWAPPED, words, held
        yield SWAPPED, words, torch.where(held >= script.first_row, held, before)  # since the forgotten sequences only


def _owner(script: Script, row: int) -> Sequence:
    return next(s for s in script.sequences if s.rows.start <= row < s.rows.stop)


def _cells(script: Script) -> np.ndarray:
    return np.concatenate([script.cells(s) for s in script.sequences])


def _pages(script: Script, cells: Tensor) -> str:
    return ", ".join(str(page) for page in (cells // script.page_size).unique().tolist())


def read(case: LayerCase, tap: str) -> Predictions:
    """Attention of some sequences through another block table, or over a page as it was earlier: the best of each."""
    if tap not in ATTENDED:
        return
    off, right = hypotheses.affected(case, tap), case.judged(tap, case.emulated[0])
    found, base = case.judged(tap, case.found), case.emulation().attention(case.rows)
    predicted, told, kinds = right.clone(), [], []
    for number, sequence in enumerate(case.s.script.sequences):
        own = torch.zeros_like(off)
        own[sequence.rows] = off[sequence.rows]
        if not own.any():
            continue
        tried = []
        for kind, words, table, page, stale in _other_tables(case.s.script, number):
            value = _over(case, tap, base, number, table, page, stale, own)
            tried.append((hypotheses.size(found[own], value[own]), kind, words, value))
        _, kind, words, value = min(tried, key=lambda t: t[0])
        predicted[own] = value[own]
        kinds.append(kind)
        told.append(f"{words}, as sequence {number} reads it{hypotheses.rows_in_words(case, own)}")
    if told:
        yield max(kinds, key=kinds.count), "; ".join(told), predicted


def _other_tables(script: Script, number: int) -> Iterator[tuple[str, str, np.ndarray, int, int]]:
    """(kind, words, pages of the sequence, a page that is read as it was before, how long before); see `_over`."""
    own = script.sequences[number].pages
    for page in own:
        yield STALE, f"page {page} is read as an earlier sequence left it", own, int(page), _EVER
        yield STALE, f"page {page} is read as it was a step before", own, int(page), _STEP
    for a, b in combinations(range(len(own)), 2):
        table = own.copy()
        table[[a, b]] = own[[b, a]]
        yield SWAPPED, f"pages {own[a]} and {own[b]} are swapped", table, -1, _EVER
    for a, page in enumerate(own):
        for other in sorted(set(range(1, script.num_pages)) - set(own.tolist())):
            table = own.copy()
            table[a] = other
            yield SWAPPED, f"page {other} of another sequence is read for page {page}", table, -1, _EVER


def _over(
    case: LayerCase, tap: str, base: dict, number: int, table: np.ndarray, page: int, stale: int, wanted: Tensor
) -> Tensor:
    """The tensor [T, width] where the sequence reads these pages, step by step as they are filled.

    page: which is read as it was before the sequence began (_EVER), or before the step (_STEP); -1: none.
    """
    script, layer = case.s.script, case.emulation()
    sequence, size, attended = script.sequences[number], script.page_size, base["attended"].clone()
    position = np.arange(len(sequence.tokens))
    cells = table[position // size] * size + position % size
    for k, step in enumerate(script.steps):
        rows = torch.from_numpy(step.rows[(step.rows >= sequence.rows.start) & (step.rows < sequence.rows.stop)])
        if not len(rows) or not wanted[rows].any():
            continue
        past, held = int(rows[0]) - sequence.rows.start, script.held[k]
        if page >= 0:
            earlier = script.before(sequence) if stale == _EVER or k == 0 else script.held[k - 1]
            held = np.where(np.arange(len(held)) // size == page, earlier, held)
        source = torch.from_numpy(held[cells[: past + len(rows)]])
        cached = (base[name][source.clamp_min(0)] for name in ("cached latent", "cached k_pe"))
        keys = [part.where(source[:, None] >= 0, torch.nan) for part in cached]
        queries = base["q_latent"][rows], base["q_pe"][rows]
        attended[rows] = layer.math.keep(formula.attend(layer.math, *queries, *keys, case.s.config.softmax_scale, past=past))
    return behind(layer, tap, attended)
