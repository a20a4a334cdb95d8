"""The exported step graph: each kind of layer is traced once through torch.export and ONNX, then stamped.

Weights are graph inputs named as `export.models.deepseek_v2_weights` names them; a lowering makes them initializers or
leaves them inputs. Constants are shared between layers. Every node, value and weight of layer i is named `model.layers.i.…`.
"""

from collections.abc import Sequence
from functools import cached_property

import onnx_ir as ir
import torch

from export.config import DeepseekV2Config
from export.models import deepseek_v2
from export.models.deepseek_v2 import ABSORBED
from export.stamper import Stamper, cache_name, weight_name
from export.tracing import BATCH_INPUTS, LAST_HIDDEN, LOGITS, Shapes, on_meta, trace, trace_embed, trace_head, trace_layer
from plugins.contract import DOMAIN, VERSION


def build(
    config: DeepseekV2Config, dtype: torch.dtype = torch.float32, cache_format: str = "float32", page_size: int = 64,
    form: str = ABSORBED,
) -> ir.Model:  # fmt: skip
    """The step graph of `config` with weights as inputs, activations and weights in `dtype`. See docs/step-graph.md.

    form: how it attends, one of `deepseek_v2.FORMS`. Both forms have the same inputs and outputs.
    """
    return build_forms(config, dtype, cache_format, page_size, (form,))[form]


def build_forms(
    config: DeepseekV2Config, dtype: torch.dtype = torch.float32, cache_format: str = "float32", page_size: int = 64,
    forms: Sequence[str] = deepseek_v2.FORMS,
) -> dict[str, ir.Model]:  # fmt: skip
    """Step graphs by form; what they have in common is traced once."""
    parts = _Parts(Shapes(config, dtype, cache_format, page_size))
    return {form: parts.stamped(form) for form in forms}


class _Parts:
    """Traced parts of one model: embedding and head serve all forms."""

    def __init__(self, shapes: Shapes):
        self.shapes, self.config = shapes, shapes.config

    @cached_property
    def embed(self) -> ir.Model:
        return trace_embed(self.shapes)

    @cached_property
    def head(self) -> ir.Model:
        return trace_head(self.shapes)

    def stamped(self, form: str) -> ir.Model:
        """The whole graph in one form."""
        c, stamper = self.config, Stamper(self.shapes)
        layers = {moe: trace_layer(self.shapes, moe, form) for moe in {c.is_moe_layer(i) for i in range(c.num_hidden_layers)}}
        hidden, cos, sin = stamper.stamp(self.embed, "embed.", dict(stamper.batch))
        for i in range(c.num_hidden_layers):
            feeds = stamper.batch | {"hidden": hidden, "cos": cos, "sin": sin, "cache": stamper.add_cache(i)}
            hidden, updated = stamper.stamp(layers[c.is_moe_layer(i)], f"model.layers.{i}.", feeds)
            hidden.name, updated.name = f"model.layers.{i}.output", f"{cache_name(i)}.updated"
            stamper.outputs.append(updated)
        logits, last_hidden = stamper.stamp(self.head, "head.", stamper.batch | {"hidden": hidden})
        logits.name, last_hidden.name = LOGITS, LAST_HIDDEN
        return stamper.finish([logits, last_hidden])


def trace_whole(
    config: DeepseekV2Config, dtype: torch.dtype = torch.float32, cache_format: str = "float32", page_size: int = 64,
    form: str = ABSORBED,
) -> ir.Model:  # fmt: skip
    """The same graph traced in one piece: slow, and what the stamped one is tested against."""
    shapes = Shapes(config, dtype, cache_format, page_size)
    step = on_meta(lambda: deepseek_v2.DeepseekV2Step(config, cache_format, form), dtype)
    caches = [shapes.cache() for _ in range(config.num_hidden_layers)]
    arguments = [shapes.batch_input(name) for name in BATCH_INPUTS]
    dynamic = (*[shapes.dynamic(name) for name in BATCH_INPUTS], [shapes.dynamic("cache")] * len(caches))
    names = [*BATCH_INPUTS, *map(cache_name, range(len(caches)))]
    outputs = [LOGITS, LAST_HIDDEN, *[f"{cache_name(i)}.updated" for i in range(len(caches))]]
    model = trace(step, (*arguments, caches), dynamic, names, outputs)
    for value in list(model.graph.inputs):
        if value.name == "embed.inv_freq":
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(shapes.inv_freq(), name=value.name)
            model.graph.register_initializer(value)
        elif value.name not in names:
            value.name = weight_name(value.name)
    model.opset_imports[DOMAIN] = VERSION
    return model
