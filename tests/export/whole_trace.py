"""The step graph traced in one piece: slow, and what the stamped one is tested against."""

import onnx_ir as ir
import torch

from latentrt.export.models.base import weight_name
from latentrt.export.tracing import CACHE, Shapes, trace
from latentrt.plugins.contract import DOMAIN, VERSION
from latentrt.plugins.step_graph import ABSORBED, INPUTS, LAST_HIDDEN, LOGITS, caches


def trace_whole(
    config, dtype: torch.dtype = torch.float32, cache_format: str = "float32", page_size: int = 64, form: str = ABSORBED
) -> ir.Model:
    """As `export.graph.build`, but for the names of inner values."""
    shapes, names = Shapes(config, dtype, cache_format, page_size), caches(config.num_hidden_layers)
    arguments = shapes.batch(), [shapes.values[CACHE].example() for _ in names]
    dynamic = {n: shapes.dynamic(n) for n in INPUTS}, [shapes.dynamic(CACHE)] * len(names)
    model = trace(
        lambda: shapes.family.step(config, cache_format, form), dtype, arguments, dynamic, [*INPUTS, *names],
        [LOGITS, LAST_HIDDEN, *names.values()],
    )  # fmt: skip
    for value in model.graph.inputs:
        if value.name not in INPUTS and value.name not in names:
            value.name = weight_name(value.name)
    model.opset_imports[DOMAIN] = VERSION
    return model
