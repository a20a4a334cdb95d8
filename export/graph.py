"""The exported step graph: each kind of layer is traced once through torch.export and ONNX, then stamped.

Weights are graph inputs named as the family's `weights` names them; a lowering makes them initializers or leaves them inputs.
Constants are shared between layers. Every node, value and weight of layer i is named `model.layers.i.…`.
"""

from collections.abc import Sequence
from functools import cached_property

import onnx_ir as ir
import torch

from latentrt.export.models.base import Config
from latentrt.export.stamper import Stamper
from latentrt.export.tracing import HIDDEN, Shapes, trace_embed, trace_head, trace_layer
from latentrt.plugins.step_graph import ABSORBED, FORMS, LAST_HIDDEN, LOGITS


def build(
    config: Config, dtype: torch.dtype = torch.float32, cache_format: str = "float32", page_size: int = 64,
    form: str = ABSORBED, ranks: int = 1,
) -> ir.Model:  # fmt: skip
    """The step graph of `config` with weights as inputs, activations and weights in `dtype`. See docs/step-graph.md.

    form: how it attends, one of FORMS. Both forms have the same inputs and outputs. ranks: how many share the experts,
    each with an equal part of them.
    """
    return build_forms(config, dtype, cache_format, page_size, (form,), ranks)[form]


def build_forms(
    config: Config, dtype: torch.dtype = torch.float32, cache_format: str = "float32", page_size: int = 64,
    forms: Sequence[str] = FORMS, ranks: int = 1,
) -> dict[str, ir.Model]:  # fmt: skip
    """Step graphs by form; what they have in common is traced once."""
    parts = _Parts(Shapes(config, dtype, cache_format, page_size, ranks))
    return {form: parts.stamped(form) for form in forms}


class _Parts:
    """Traced parts of one model: embedding and head serve all forms."""

    def __init__(self, shapes: Shapes):
        self.shapes = shapes
        family, config = shapes.family, shapes.config
        self.kinds = [family.layer_kind(config, i) for i in range(config.num_hidden_layers)]

    @cached_property
    def embed(self) -> ir.Model:
        return trace_embed(self.shapes)

    @cached_property
    def head(self) -> ir.Model:
        return trace_head(self.shapes)

    def stamped(self, form: str) -> ir.Model:
        """The whole graph in one form."""
        stamper = Stamper(self.shapes)
        layers = {kind: trace_layer(self.shapes, kind, form) for kind in dict.fromkeys(self.kinds)}
        hidden, *angles = stamper.stamp(self.embed, "embed.")
        given = dict(zip(self.shapes.angles, angles, strict=True))
        for i, kind in enumerate(self.kinds):
            hidden = stamper.stamp_layer(layers[kind], i, given | {HIDDEN: hidden})
        logits, last_hidden = stamper.stamp(self.head, "head.", {HIDDEN: hidden})
        logits.name, last_hidden.name = LOGITS, LAST_HIDDEN
        return stamper.finish([logits, last_hidden])
