"""Hypotheses of attention: another scale, other positions, another mask, a softmax in half precision."""

from collections.abc import Callable

import torch
from torch import Tensor

from latentrt.validation.bisect import hypotheses
from latentrt.validation.bisect.case import LayerCase
from latentrt.validation.bisect.of_values import SCALE, Predictions
from latentrt.validation.reference import formulas
from latentrt.validation.reference.layer import Layer, Rules

POSITIONS, ROPE, MASK, HALF = "positions off", "half-split RoPE", "causal mask off", "softmax in half precision"
_MASKS = {1: "a token sees the next one", -1: "a token does not see itself", 2: "a token sees the next two"}
_SHIFTS = (1, -1, 2, -2, 3, -3, 4, -4)
_ROTATED = ("q_pe", "k_pe", "cached k_pe", "attended", "values", "attention")
ATTENDED = ("attended", "values", "attention")


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
    if tap in ATTENDED:
        for k, words in _MASKS.items():
            yield from _variant(case, tap, f"{MASK} by {abs(k)}", words, Rules(mask_offset=k))


def halves(case: LayerCase, tap: str) -> Predictions:
    if tap in ATTENDED:
        for kind in (torch.float16, torch.bfloat16):
            name = str(kind).removeprefix("torch.")
            yield from _variant(case, tap, HALF, f"scores and their softmax in {name}", Rules(softmax_dtype=kind))


def scales(case: LayerCase, tap: str) -> Predictions:
    """The softmax scale that fits best, over four octaves, by golden section in the logarithm after a coarse search."""
    if tap not in ATTENDED:
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


def _variant(case: LayerCase, tap: str, kind: str, words: str, rules: Rules) -> Predictions:
    """The tensor under other rules, for all tokens, or for those that are affected where others are as they should be."""
    predicted = case.judged(tap, case.emulation().attention(case.rows, rules))
    yield kind, words, predicted
    rows = hypotheses.affected(case, tap)
    if not rows.all():
        right = case.judged(tap, case.emulated[0])
        yield kind, words + hypotheses.rows_in_words(case, rows), hypotheses.where_affected(rows, predicted, right)


def _attended(case: LayerCase, tap: str, base: dict[str, Tensor], rules: Rules) -> Tensor:
    """The tensor with attention under other rules over what came before it: [T, width]."""
    layer = case.emulation()
    given = base["q_latent"], base["q_pe"], base["cached latent"], base["cached k_pe"]
    return behind(layer, tap, layer.math.keep(layer.attend(layer.math, *given, case.rows, rules)))


def behind(layer: Layer, tap: str, attended: Tensor) -> Tensor:
    """What a tensor is, [T, width], if attention over the cache gave this."""
    m, at = layer.math, f"{layer.prefix}.self_attn"
    if tap == "attended":
        return attended.flatten(1)
    values = layer.heads(m, attended, f"{at}.kv_b_proj.w_uv").flatten(1)
    return m.linear(values, f"{at}.o_proj") if tap == "attention" else values
