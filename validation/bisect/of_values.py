"""Hypotheses that any tensor may fall to: a factor, a permutation, a transposition, a missing term, saturation."""

from collections.abc import Iterator

import torch
from torch import Tensor

from latentrt.validation.bisect import tensors
from latentrt.validation.bisect.case import LayerCase
from latentrt.validation.reference import formulas
from latentrt.validation.reference.layer import Choice

Predictions = Iterator[tuple[str, str, Tensor]]
SCALE, PERMUTED, TRANSPOSED = "wrong scale factor", "permutation", "transposition"
MISSING, SATURATED = "missing term", "saturated values"
_TOP = 0.999  # of a row's largest: what counts as being at it
_NAMED = 1e-3  # how near a factor must be to a known one


def scaled(case: LayerCase, tap: str) -> Predictions:
    """found / expected by regression."""
    right, found = _pair(case, tap)
    k = float((found * right).nan_to_num().sum() / right.square().sum())
    yield SCALE, f"found / expected = {k:.4g}{named_factor(case, tap, k)}", k * right


def named_factor(case: LayerCase, tap: str, k: float) -> str:
    """What a factor is known for."""
    c = case.s.config
    known = {}
    if tap in ("topk_weights", "experts"):
        known["routed_scaling_factor dropped"] = 1 / c.routed_scaling_factor
        known["routed_scaling_factor applied twice"] = c.routed_scaling_factor
    if tap in ("q_pe", "k_pe"):
        known["the rotation's attention factor dropped"] = 1 / formulas.rotation_factor(c)
    fits = [f" ({words})" for words, factor in known.items() if factor != 1 and abs(k / factor - 1) < _NAMED]
    return fits[0] if fits else ""


def columns(case: LayerCase, tap: str) -> Predictions:
    """Every column of the found one is the likest of the expected one's."""
    right, found = _pair(case, tap)
    if right.shape[1] > 1 << 14 or not torch.isfinite(found).all():
        return
    alike = _unit(found).T @ _unit(right)  # [found, expected]
    order = alike.argmax(1)
    moved = int((order != torch.arange(len(order))).sum())
    if moved and len(order.unique()) == len(order):
        yield PERMUTED, f"{moved} of {len(order)} columns are in other places ({_moves(order)})", right[:, order]


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=0).clamp_min(1e-300)


def _moves(order: Tensor) -> str:
    """The first columns that moved; halves in turn, or turns in halves, by that name."""
    width = len(order)
    if width % 2 == 0:
        turns = torch.arange(width).view(2, -1).T.flatten()
        if torch.equal(order, turns):
            return "the two halves in turn"
        if torch.equal(order, turns.argsort()):
            return "even ones before odd ones"
    moved = torch.nonzero(order != torch.arange(width)).flatten()[:4].tolist()
    return ", ".join(f"{j} holds {int(order[j])}" for j in moved)


def transposed(case: LayerCase, tap: str) -> Predictions:
    """Heads and channels of a head have changed places."""
    right, heads = _pair(case, tap)[0], case.s.config.num_attention_heads
    if tap in ("q_latent", "attended", "values", "q_pe", "q_proj", "q_b_proj") and right.shape[1] % heads == 0:
        turned = right.unflatten(1, (heads, -1)).transpose(1, 2).flatten(1)
        yield TRANSPOSED, f"its {heads} heads and their channels have changed places", turned


def without_a_term(case: LayerCase, tap: str) -> Predictions:
    """Sums without one of their terms."""
    right, terms = case.emulated[0], {}
    before = case.rows.hidden + right["attention"]
    if tap == "mlp" and "experts" in right:
        shared = right.get("shared_experts.down_proj", torch.zeros_like(right["experts"]))
        terms = {"the shared experts": right["experts"], "the routed experts": shared}
    elif tap == "hidden":
        terms = {
            "the residual": right["mlp"], "the MLP's output": before, "attention's output": case.rows.hidden + right["mlp"],
            "the layer's input": right["attention"] + right["mlp"],
        }  # fmt: skip
    elif tap == "experts":
        terms = _without_a_choice(case)
    elif tap in tensors.LAYER:
        bias = f"{case.part.name}.{tensors.LAYER[tap].module}.bias"
        if bias in case.s.inner:
            terms = {"the bias": right[tap] - case.s.exact(inner=True).weight(bias)}
    for name, value in terms.items():
        yield MISSING, f"{name} left out", value


def _without_a_choice(case: LayerCase) -> dict[str, Tensor]:
    """The experts' sum without the first, or the last, of the chosen ones."""
    layer, right, result = case.emulation(), case.emulated[0], {}
    weights = layer.weights_of(right["router_logits"], case.ids)
    for words, kept in (("the best chosen expert", slice(1, None)), ("the last chosen expert", slice(0, -1))):
        result[words] = layer.experts(right["post_attention_layernorm"], Choice(case.ids[:, kept], weights[:, kept]))
    return result


def saturated(case: LayerCase, tap: str) -> Predictions:
    """All that is beyond the largest found of a row, or of a group of it that shares a scale, is found as that."""
    right, found = _pair(case, tap)
    for group in dict.fromkeys((right.shape[1], 128, 64, 32)):
        if group <= right.shape[1] and right.shape[1] % group == 0:
            parts = found.nan_to_num().unflatten(1, (-1, group))
            most = parts.abs().amax(-1, keepdim=True).expand_as(parts).flatten(1)
            clipped = torch.minimum(torch.maximum(right, -most), most)
            share = float((found.abs() >= _TOP * most).double().mean())
            if float((right.abs() > most / _TOP).double().mean()) > 1e-4:
                yield SATURATED, f"{share:.1%} of the elements are at the largest of their group of {group}", clipped


def saturated_inputs(case: LayerCase, tap: str) -> Predictions:
    """The product of an input that is cut off at a share of each row's largest; the share is searched for."""
    entry = tensors.LAYER.get(tap)
    inputs = _input(case, tap)
    if inputs is None or not entry.weights or not entry.weights[0].endswith("proj.weight"):
        return
    layer, module = case.emulation(), f"{case.part.name}.{entry.module}"
    _, found = _pair(case, tap)
    largest = inputs.abs().amax(-1, keepdim=True)

    def predicted(share: float) -> Tensor:
        most = share * largest
        return layer.math.linear(torch.minimum(torch.maximum(inputs, -most), most), module)

    def left(share: float) -> float:
        return float((found - predicted(share)).nan_to_num(1e30).norm())

    best = min((k / 16 for k in range(1, 16)), key=left)
    for width in (1 / 32, 1 / 64, 1 / 128, 1 / 256):
        best = min((best - width, best, best + width), key=left)
    share = float((inputs.abs() >= best * largest).double().mean())
    yield SATURATED, f"{share:.1%} of the input's elements are cut off at {best:.3g} of their row's largest", predicted(best)


_INPUTS = {
    "q_proj": "input_layernorm", "q_a_proj": "input_layernorm", "kv_a_proj_with_mqa": "input_layernorm",
    "q_b_proj": "q_a_layernorm", "attention": "values", "gate_proj": "post_attention_layernorm",
    "up_proj": "post_attention_layernorm", "shared_experts.gate_proj": "post_attention_layernorm",
    "shared_experts.up_proj": "post_attention_layernorm",
}  # fmt: skip


def _input(case: LayerCase, tap: str) -> Tensor | None:
    """What a product multiplies, emulated."""
    return case.emulated[0][_INPUTS[tap]] if tap in _INPUTS else None


def _pair(case: LayerCase, tap: str) -> tuple[Tensor, Tensor]:
    return case.judged(tap, case.emulated[0]), case.judged(tap, case.found)
