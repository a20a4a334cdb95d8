"""Hypotheses of attention: another scale, other positions, another mask, a softmax in half precision, other pages."""

from collections.abc import Callable, Iterator
from itertools import combinations, product

import torch
from torch import Tensor

from latentrt.validation.bisect import hypotheses
from latentrt.validation.bisect.case import LayerCase
from latentrt.validation.bisect.of_values import SCALE, Predictions
from latentrt.validation.bisect.script import Sequence
from latentrt.validation.reference import formulas
from latentrt.validation.reference.layer import Rules

POSITIONS, ROPE, MASK, HALF = "positions off", "half-split RoPE", "causal mask off", "softmax in half precision"
SWAPPED, STALE = "pages swapped", "stale page"
_SHIFTS = (1, -1, 2, -2, 3, -3, 4, -4)
_ROTATED = ("q_pe", "k_pe", "cached k_pe", "attended", "values", "attention")
_ATTENDED = ("attended", "values", "attention")


def rotations(case: LayerCase, tap: str) -> Predictions:
    """Other pairs, or the angles of positions a few later or earlier, a page among them."""
    if tap not in _ROTATED:
        return
    yield from _variant(case, tap, ROPE, "pairs (i, i + R/2) are turned instead of (2i, 2i + 1)", Rules(interleaved_rope=False))
    none = Rules(angles=lambda cos, sin: (torch.ones_like(cos), torch.zeros_like(sin)))
    yield from _variant(case, tap, ROPE + " (none)", "nothing is turned", none)
    yield from _variant(case, tap, ROPE + " (backwards)", "pairs are turned backwards", Rules(angles=lambda c, s: (c, -s)))
    page = case.s.script.page_size
    for k in (*_SHIFTS, page, -page):
        yield from _variant(case, tap, POSITIONS, f"RoPE of position {k:+d} fits", Rules(angles=shift(case, k)))


def shift(case: LayerCase, k: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Turns angles by k more positions."""
    turn = k * torch.from_numpy(formulas.inverse_frequencies(case.s.config))
    return lambda cos, sin: (cos * turn.cos() - sin * turn.sin(), sin * turn.cos() + cos * turn.sin())


def masks(case: LayerCase, tap: str) -> Predictions:
    if tap in _ATTENDED:
        for k, words in ((1, "a token sees the next one"), (-1, "a token does not see itself"), (2, "a token sees the next two")):
            yield from _variant(case, tap, f"{MASK} by {abs(k)}", words, Rules(mask_offset=k))


def halves(case: LayerCase, tap: str) -> Predictions:
    if tap in _ATTENDED:
        for kind in (torch.float16, torch.bfloat16):
            name = str(kind).removeprefix("torch.")
            yield from _variant(case, tap, HALF, f"scores and their softmax in {name}", Rules(softmax_dtype=kind))


def scales(case: LayerCase, tap: str) -> Predictions:
    """The softmax scale that fits best, over four octaves, by golden section in the logarithm after a coarse search."""
    if tap not in _ATTENDED:
        return
    own, found = case.s.config.softmax_scale, case.judged(tap, case.found)
    base = case.emulation().attention(case.rows)
    tried: dict[float, Tensor] = {}

    def left(log: float) -> float:
        if log not in tried:
            tried[log] = _attended(case, tap, base, Rules(softmax_scale=own * 2**log))
        return float((found - tried[log]).nan_to_num(1e30).norm())

    best, width = min((k / 4 for k in range(-8, 9)), key=left), 0.25
    for _ in range(12):
        width /= 2
        best = min((best - width, best, best + width), key=left)
    yield SCALE, f"of the softmax: found / expected = {2**best:.4g}{_known_scale(case, 2**best)}", tried[best]


def _known_scale(case: LayerCase, k: float) -> str:
    """YaRN's mscale, its square, or the dimension under the root."""
    c = case.s.config
    mscale = formulas.yarn_mscale(c.rope.factor, c.rope.mscale_all_dim or 0.0)
    known = {
        "YaRN's mscale^2 dropped": mscale**-2, "mscale instead of mscale^2": 1 / mscale, "mscale^2 twice": mscale**2,
        "qk_nope_head_dim^-0.5 instead of qk_head_dim^-0.5": (c.qk_head_dim / c.qk_nope_head_dim) ** 0.5,
        "qk_head_dim^-0.5 dropped": c.qk_head_dim**0.5,
    }  # fmt: skip
    fits = [f" ({words})" for words, factor in known.items() if factor != 1 and abs(k / factor - 1) < 2e-3]
    return fits[0] if fits else ""


def pages_read(case: LayerCase, tap: str) -> Predictions:
    """Attention of one sequence over keys of which a page's are another page's, or what that page held before."""
    if tap not in _ATTENDED:
        return
    rows, base = hypotheses.affected(case, tap), case.emulation().attention(case.rows)
    kept = base["cached latent"], base["cached k_pe"]
    right = case.judged(tap, case.emulated[0])
    for number, sequence in enumerate(case.s.script.sequences):
        if not rows[sequence.rows].any():
            continue
        own = torch.zeros_like(rows)
        own[sequence.rows] = rows[sequence.rows]
        for kind, words, source in _other_pages(case, sequence):
            changed = [keys.index_select(0, source) for keys in kept]

            def keys(which: int, latent: Tensor, k_pe: Tensor, number=number, changed=changed):
                return changed if which == number else (latent, k_pe)

            predicted = _attended(case, tap, base, Rules(keys=keys))
            told = hypotheses.rows_in_words(case, own)
            yield kind, f"{words}, as sequence {number} reads it{told}", hypotheses.where_affected(own, predicted, right)


def _other_pages(case: LayerCase, sequence: Sequence) -> Iterator[tuple[str, str, Tensor]]:
    """(kind, words, for every token of the sequence the row whose keys are read instead)."""
    script, size = case.s.script, case.s.script.page_size
    plain = torch.arange(sequence.rows.start, sequence.rows.stop)
    for a, b in combinations(range(len(sequence.pages)), 2):
        source = plain.clone()
        length = min(size, len(plain) - b * size)
        source[a * size :][:length], source[b * size :][:length] = plain[b * size :][:length], plain[a * size :][:length].clone()
        yield SWAPPED, f"pages {sequence.pages[a]} and {sequence.pages[b]} are swapped", source
    earlier = _earlier(script)
    for a, page in enumerate(sequence.pages):
        part = slice(a * size, min((a + 1) * size, len(plain)))
        cells = torch.from_numpy(script.cells(sequence))[part].tolist()
        if any(cell in earlier for cell in cells):
            source = plain.clone()
            source[part] = torch.tensor([earlier.get(cell, int(row)) for cell, row in zip(cells, plain[part], strict=True)])
            yield STALE, f"page {page} is read as it was before: tokens of an earlier sequence", source
    for a, (other, line) in product(range(len(sequence.pages)), _lines(script)):
        if other is not sequence:
            source, start = plain.clone(), other.rows.start + line * size
            length = min(size, len(plain) - a * size, other.rows.stop - start)
            source[a * size :][:length] = torch.arange(start, start + length)
            yield SWAPPED, f"page {other.pages[line]} of another sequence is read for page {sequence.pages[a]}", source


def _lines(script) -> list[tuple[Sequence, int]]:
    return [(s, k) for s in script.sequences[1:] for k in range(len(s.pages))]


def _earlier(script) -> dict[int, int]:
    """Cell -> the row of the forgotten sequence that was written there."""
    first = script.sequences[0]
    return {int(cell): first.rows.start + k for k, cell in enumerate(script.cells(first))}


def pages_written(case: LayerCase, tap: str) -> Predictions:
    """A page's cells hold other rows than they should: another page's, an earlier sequence's, or nothing at all."""
    if not tap.startswith("cached"):
        return
    found, right = case.judged(tap, case.found), case.judged(tap, case.emulated[0])
    first = len(case.s.script.tokens) - len(found)  # of the cache in the end the forgotten sequence is left out
    off = hypotheses.affected(case, tap)
    whole = case.emulated[0][tap].flatten(1)
    likest = torch.cdist(found.nan_to_num(1e30), whole).argmin(1)
    told = hypotheses.rows_in_words(case, off) if not first else ""
    if off.any() and not torch.isfinite(found[off]).any():
        yield STALE, f"cells were never written{told}", found
        return
    predicted = hypotheses.where_affected(off, whole[likest], right)
    cells = _cells(case)
    own = cells[first:][off]
    same = cells[likest[off]] == own
    if off.any() and same.float().mean() > 0.5:
        pages = sorted({int(cell) // case.s.script.page_size for cell in own})
        yield STALE, f"page {', '.join(map(str, pages))} still holds the tokens of an earlier sequence{told}", predicted
    elif off.any():
        size = case.s.script.page_size
        pairs = sorted({(int(a) // size, int(b) // size) for a, b in zip(own, cells[likest[off]], strict=True)})
        moves = ", ".join(f"page {a} holds what belongs to page {b}" for a, b in pairs[:4])
        yield SWAPPED, f"{moves}{told}", predicted


def _cells(case: LayerCase) -> Tensor:
    script = case.s.script
    return torch.cat([torch.from_numpy(script.cells(s)) for s in script.sequences])


def _variant(case: LayerCase, tap: str, kind: str, words: str, rules: Rules) -> Predictions:
    """The tensor under other rules, where it is affected at all; elsewhere as it should be."""
    rows = hypotheses.affected(case, tap)
    predicted = case.judged(tap, case.emulation().attention(case.rows, rules))
    right = case.judged(tap, case.emulated[0])
    yield kind, words + hypotheses.rows_in_words(case, rows), hypotheses.where_affected(rows, predicted, right)


def _attended(case: LayerCase, tap: str, base: dict[str, Tensor], rules: Rules) -> Tensor:
    """The tensor with attention under other rules over what came before it: [T, width]."""
    layer = case.emulation()
    m, at = layer.math, f"{layer.prefix}.self_attn"
    given = base["q_latent"], base["q_pe"], base["cached latent"], base["cached k_pe"]
    value = m.keep(layer.attend(m, *given, case.rows, rules))
    if tap != "attended":
        value = layer.heads(m, value, f"{at}.kv_b_proj.w_uv").flatten(1)
    return (m.linear(value, f"{at}.o_proj") if tap == "attention" else value).flatten(1)
