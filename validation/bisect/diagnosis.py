"""From a tensor beyond its tolerance to a defect with a name: stored weights first, then what the tensor's values say."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from latentrt.validation.bisect import hypotheses, of_attention, of_pages, of_routing, of_values, of_weights
from latentrt.validation.bisect.case import Case, EmbedCase, LayerCase
from latentrt.validation.bisect.hypotheses import Hypothesis
from latentrt.validation.bisect.spread import Spread

UNKNOWN = "unknown"
_SHOWN = 3  # hypotheses that are kept beside the best


@dataclass(frozen=True)
class Defect:
    """The first tensor of a part that is no rounding: where it is, by both names, and what fits.

    weight: the stored weight that is the cause, by the checkpoint's name. others: hypotheses that fit less, best first.
    """

    part: str
    tensor: str
    module: str
    what: str
    value: str
    node: str
    spread: Spread | None
    hypothesis: Hypothesis
    weight: str | None = None
    others: list[Hypothesis] = field(default_factory=list)

    @property
    def place(self) -> str:
        """The checkpoint's name of what is wrong."""
        return self.weight or self.module


def diagnose(case: Case, tap: str, spread: Spread) -> Defect:
    """Why a tensor is off: a stored weight right before it, what its values say, or a stored weight farther before it."""
    suspect = next(of_weights.suspects(case, case.weights_behind(tap)), None)
    if suspect is None:
        found = hypotheses.judged(case, tap, _sources(case, tap), spread.limit.whole)
        if found and found[0].fits:
            return defect(case, tap, spread, found)
        suspect = next(of_weights.suspects(case, case.weights_before(tap)), None)
        if suspect is None:
            return defect(case, tap, spread, [_none(found), *found])
    best = [h for h in suspect.hypotheses if h.fits]
    words = f"by {suspect.error:.2g}, and no hypothesis fits"
    return defect(case, tap, spread, best or [Hypothesis(of_weights.OTHER, words, 1.0)], suspect.name)


def _none(found: list[Hypothesis]) -> Hypothesis:
    nearest = f"; the nearest is {found[0].kind} ({found[0].words}), which leaves {found[0].left:.0%}" if found else ""
    return Hypothesis(UNKNOWN, f"no hypothesis fits{nearest}", 1.0)


def defect(case: Case, tap: str, spread: Spread | None, found: list[Hypothesis], weight: str | None = None) -> Defect:
    known, part = case.known[tap], case.part
    module = case.module(found[0].module or known.module)
    others = [h for h in found[1:] if h.left < 1][:_SHOWN]
    graph = part.taps.get(tap, part.cache or ""), part.nodes.get(tap, "")
    return Defect(part.name, tap, module, known.what, *graph, spread, found[0], weight, others)


_OF_LAYERS = {  # in the order in which they are believed, where several explain all; with the module that each speaks of
    of_pages.written: "", of_attention.rotations: "self_attn.rotary_emb", of_attention.masks: "self_attn",
    of_attention.scales: "self_attn", of_pages.read: "self_attn", of_attention.halves: "self_attn", of_values.scaled: "",
    of_values.without_a_term: "", of_values.transposed: "", of_values.columns: "", of_values.saturated_inputs: "",
    of_values.saturated: "",
}  # fmt: skip


def _sources(case: Case, tap: str) -> dict[hypotheses.Source, str]:
    if isinstance(case, EmbedCase):
        return dict.fromkeys((angles, of_values.scaled, of_values.columns), "")
    if isinstance(case, LayerCase):
        return dict.fromkeys((of_values.scaled, of_routing.weight_rules), "") if tap == "topk_weights" else _OF_LAYERS
    return dict.fromkeys((of_values.scaled, of_values.columns), "")


def angles(case: EmbedCase, tap: str) -> of_values.Predictions:
    """Other positions, plain frequencies, or no attention factor, in the angles of all layers."""
    if tap == "embed_tokens":
        return
    def predicted(**changed) -> Tensor:
        return case.at(case.s.emulated(), torch.float32, **changed)[tap]

    for k in (1, -1, 2, -2, 3, -3, 4, -4):
        yield of_attention.POSITIONS, f"the angles are those of position {k:+d}", predicted(shift=k)
    yield "YaRN frequencies dropped", "the angles are those without YaRN", predicted(yarn=False)
    yield "attention factor dropped", "cos and sin are those without YaRN's attention factor", predicted(factor=False)


def routing(case: LayerCase) -> tuple[Defect | None, list]:
    """The router's choice: a defect if some tokens' experts are no near tie's; and all flips."""
    compared = of_routing.compared(case)
    wrong = [f for f in compared.flips if not f.explained]
    if not wrong:
        return None, compared.flips
    found = of_routing.rules(case)
    return defect(case, "topk_ids", None, found if found and found[0].fits else [_none(found), *found]), compared.flips
