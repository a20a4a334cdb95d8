"""Hypotheses of stored weights: what the bundle has for a weight, decoded, against the checkpoint's through the same format.

The caller asks for the weights between the last right tensor and the first wrong one, so that one which is off by more than its
format's rounding is the cause.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentrt.export.models.base import Weight
from latentrt.export.quantization import WeightFormat
from latentrt.validation.bisect.case import Case
from latentrt.validation.bisect.hypotheses import Hypothesis
from latentrt.validation.bisect.of_values import PERMUTED, SATURATED, SCALE, TRANSPOSED
from latentrt.validation.bisect.spread import DOUBT

STUCK, SCALES, OTHER = "weight stuck", "transposed scale", "weight differs from the checkpoint's"
_ALIKE = 1e-3  # relative: scales by regression over codes that are the same
_SAME = 1e-5  # relative: float32's rounding of decoded values, with room


@dataclass(frozen=True)
class Suspect:
    """A weight that is not the checkpoint's, by its name there, with what fits (none: no hypothesis does)."""

    weight: Weight
    name: str
    error: float
    hypotheses: list[Hypothesis]


def suspects(case: Case, weights: list[Weight]) -> Iterator[Suspect]:
    """Those of some weights that are off, in order."""
    for weight in weights:
        found = suspect(case, weight)
        if found:
            yield found


def suspect(case: Case, weight: Weight) -> Suspect | None:
    stacked = weight.role in ("gate_up", "down")
    return _of_experts(case, weight) if stacked else _of_matrix(case, weight)


def _of_matrix(case: Case, weight: Weight) -> Suspect | None:
    exact = weight.read(case.s.checkpoint.read).float()
    rounded, found = _rounded(case, weight, exact), case.s.stored.decode(weight).float()
    error = _off(found, rounded, exact)
    if error is None:
        return None
    kinds = sorted(_matrix_kinds(case, weight, found, rounded), key=lambda h: h.left)
    return Suspect(weight, weight.sources[0][0], error, kinds)


def _off(found: Tensor, rounded: Tensor, exact: Tensor) -> float | None:
    """How far a weight is from the checkpoint's; None where the format's rounding comes to that, of every row as well."""
    allowed = DOUBT * max(_relative(rounded, exact), _SAME)
    rows = zip(found, rounded, exact, strict=True) if exact.dim() > 1 else ()
    for f, r, e in ((found, rounded, exact), *rows):
        if _relative(f, e) > max(allowed, DOUBT * _relative(r, e)) and _relative(f, r) > _SAME:
            return _relative(found, exact)
    return None


def _rounded(case: Case, weight: Weight, values: Tensor) -> Tensor:
    """Through the weight set's format."""
    weight_format: WeightFormat = case.s.numerics.format
    return weight_format.decode(weight, weight_format.encode(weight, values.float())).float()


def _relative(found: Tensor, expected: Tensor) -> float:
    value = float((found.double() - expected.double()).norm() / (expected.double().norm() + 1e-300))
    return value if value == value else float("inf")


def _matrix_kinds(case: Case, weight: Weight, found: Tensor, right: Tensor) -> Iterator[Hypothesis]:
    error = max(float((found - right).norm()), 1e-300)

    def hypothesis(kind: str, words: str, predicted: Tensor) -> Hypothesis:
        return Hypothesis(kind, words, float((found - predicted).nan_to_num(1e30).norm()) / error)

    if float(found.std()) <= _SAME * float(right.std()):
        yield Hypothesis(STUCK, f"all its values are {float(found.flatten()[0]):.4g}", 0.0)
        return
    for layer, other in _same_elsewhere(case, weight):
        yield hypothesis(STUCK, f"it holds the values of layer {layer}", other)
    yield from _scale_kinds(case, weight, found, right)
    yield hypothesis(STUCK, "every row, or block that shares a scale, is one constant", _constants(case, weight, found))
    k = float((found * right).sum() / right.square().sum())
    yield hypothesis(SCALE, f"of the weight: found / expected = {k:.4g}", k * right)
    flat_found, flat = found.flatten(0, -2), right.flatten(0, -2)
    for axis, word in ((0, "rows"), (1, "columns")):
        order = _order(flat_found, flat, axis)
        if order is not None:
            moved = int((order != torch.arange(len(order))).sum())
            yield hypothesis(PERMUTED, f"{moved} of {len(order)} {word} are in other places",
                             flat.index_select(axis, order).view(right.shape))  # fmt: skip
    if right.dim() > 1:
        turned = right.transpose(-1, -2)
        yield hypothesis(TRANSPOSED, "rows and columns have changed places", turned.reshape(right.shape))
        most = found.abs().amax(-1, keepdim=True)
        share = float((right.abs() > most).double().mean())
        if share > 1e-4:
            clipped = torch.minimum(torch.maximum(right, -most), most)
            yield hypothesis(SATURATED, f"{share:.1%} of the weights are cut off at their row's largest", clipped)


def _constants(case: Case, weight: Weight, found: Tensor) -> Tensor:
    """The found weight with its blocks' means in the place of all their elements."""
    size = case.s.numerics.format.blocks.get(weight.role) or found.shape[-1]
    turned = found.transpose(-1, -2) if weight.role == "absorbed" else found
    blocks = _blocks(turned, min(size, turned.shape[-1]))
    means = blocks.mean(-1, keepdim=True).expand_as(blocks).flatten(-2)[..., : turned.shape[-1]]
    return means.transpose(-1, -2) if weight.role == "absorbed" else means


def _same_elsewhere(case: Case, weight: Weight) -> Iterator[tuple[int, Tensor]]:
    """The like weight of every other layer, through the format, one in memory at a time."""
    inside = weight.name.removeprefix(f"{case.part.name}.")
    for layer in range(case.s.config.num_hidden_layers if inside != weight.name else 0):
        other = case.s.inner.get(f"model.layers.{layer}.{inside}")
        if f"model.layers.{layer}" != case.part.name and other is not None and other.shape == weight.shape:
            yield layer, _rounded(case, weight, other.read(case.s.checkpoint.read).float())


def _scale_kinds(case: Case, weight: Weight, found: Tensor, right: Tensor) -> Iterator[Hypothesis]:
    """The codes are right, and each block has another's scale: those of a transposed table, or any others."""
    blocks = case.s.numerics.format.blocks.get(weight.role) if case.s.numerics.format.is_quantized(weight) else None
    if blocks is None:
        return
    if weight.role == "absorbed":
        found, right = found.transpose(-1, -2), right.transpose(-1, -2)
    parts = [_blocks(t, blocks or t.shape[-1]) for t in (found, right)]
    factors = (parts[0] * parts[1]).sum(-1) / parts[1].square().sum(-1).clamp_min(1e-30)  # [..., out, blocks]
    rest = float((parts[0] - factors[..., None] * parts[1]).norm()) / max(float((found - right).norm()), 1e-300)
    expected = case.s.numerics.format
    rows = getattr(expected, "rows", expected)
    scale = rows.encode(weight, weight.read(case.s.checkpoint.read).float())[1].reshape(factors.shape)
    yield _named_scales(factors * scale, scale, rest, case.s.stored.interleaved and weight.role == "gate_up")


def _named_scales(found: Tensor, scale: Tensor, rest: float, interleaved: bool) -> Hypothesis:
    """What scales that are not the expected ones are. interleaved: gate and up rows take turns where they are stored."""
    *heads, outputs, blocks = scale.shape
    if interleaved:
        found, scale = (t.unflatten(-2, (2, -1)).transpose(-3, -2).flatten(-3, -2) for t in (found, scale))
    tables = {f"[{outputs}, {blocks}] of outputs and blocks": (-1, -2)}
    if heads:
        tables[f"[{heads[0]}, {outputs}] of experts or heads and outputs"] = (0, -2)
    for words, axes in tables.items():
        turned = scale.transpose(*axes).reshape(scale.shape)
        if not torch.equal(turned, scale) and torch.allclose(found, turned, rtol=_ALIKE):
            return Hypothesis(SCALES, f"its scales lie as the transpose of their table {words}", rest)
    if torch.allclose(found.flatten().sort().values, scale.flatten().sort().values, rtol=_ALIKE):
        return Hypothesis(PERMUTED, "its scales are in other places", rest)
    off = int(((found / scale - 1).abs() > _ALIKE).sum())
    ratio = float((found / scale).flatten()[(found / scale - 1).abs().argmax()])
    return Hypothesis(SCALE, f"{off} of {scale.numel()} scales are others, one is {ratio:.4g} times its own", rest)


def _blocks(values: Tensor, size: int) -> Tensor:
    gap = -values.shape[-1] % size
    return torch.nn.functional.pad(values, (0, gap)).unflatten(-1, (-1, size))


def _order(found: Tensor, right: Tensor, axis: int) -> Tensor | None:
    """Which row (column) of the right weight each found one is, by a product with random numbers; None where it is no order."""
    found, right = (t if axis == 0 else t.T for t in (found, right))
    if len(found) != len(right) or right.shape[1] < 2:
        return None
    marks = torch.randn(right.shape[1], 4, generator=torch.Generator().manual_seed(0))
    order = torch.cdist((found @ marks)[None], (right @ marks)[None])[0].argmin(1) if len(found) <= 1 << 13 else None
    moved = order is not None and not torch.equal(order, torch.arange(len(order)))
    return order if moved and len(order.unique()) == len(order) else None


def _of_experts(case: Case, weight: Weight) -> Suspect | None:
    """Stacked experts, one in memory at a time beside the stored ones."""
    stored = case.s.stored.decode(weight)
    single = replace(weight, shape=(1, *weight.shape[1:]))
    read = case.s.checkpoint.read
    bad, marks = {}, {}
    mark = torch.randn(weight.shape[-1], generator=torch.Generator().manual_seed(0))
    for e in range(len(stored)):
        exact = weight.slab(read, e)[0].float()
        rounded = _rounded(case, single, exact[None])[0]
        marks[e] = rounded @ mark
        error = _off(stored[e], rounded, exact)
        if error is not None:
            bad[e] = error
    if not bad:
        return None
    places = {e: min(marks, key=lambda o, e=e: float((stored[e] @ mark - marks[o]).norm())) for e in bad}
    if all(places[e] != e for e in bad) and all(_near(stored[e] @ mark, marks[places[e]]) for e in bad):
        moves = ", ".join(f"{e} holds {places[e]}" for e in list(bad)[:4])
        kind = f"experts permuted ({PERMUTED})" if set(places.values()) == set(bad) else STUCK
        found = [Hypothesis(kind, f"{len(bad)} of {len(stored)} experts are others: {moves}", 0.0)]
        return Suspect(weight, weight.sources[min(bad)][0], max(bad.values()), found)
    whole = _whole_scales(case, weight, stored)
    if whole:
        return Suspect(weight, weight.sources[min(bad)][0], max(bad.values()), [whole])
    e = max(bad, key=bad.get)
    exact = weight.slab(read, e)[0].float()
    one = replace(weight, role="linear" if not case.s.numerics.format.is_quantized(weight) else weight.role)
    kinds = _expert_kinds(case, one, stored[e], _rounded(case, single, exact[None])[0], e)
    return Suspect(weight, weight.sources[e][0], bad[e], sorted(kinds, key=lambda h: h.left))


def _near(found: Tensor, expected: Tensor) -> bool:
    return _relative(found, expected) < 0.05


def _whole_scales(case: Case, weight: Weight, stored: Tensor) -> Hypothesis | None:
    """Scales of all experts together: a transposed table spans experts."""
    if not case.s.numerics.format.is_quantized(weight):
        return None
    right = torch.cat([_rounded(case, replace(weight, shape=(1, *weight.shape[1:])), slab.float())
                       for slab in weight.slabs(case.s.checkpoint.read)])  # fmt: skip
    found = next(_scale_kinds(case, weight, stored, right), None)
    return found if found and found.fits else None


def _expert_kinds(case: Case, weight: Weight, found: Tensor, right: Tensor, expert: int) -> Iterator[Hypothesis]:
    for kind in _matrix_kinds(case, replace(weight, name="one expert", role="expert"), found, right):
        yield replace(kind, words=f"expert {expert}: {kind.words}")
