"""The third and fourth link, which are graphs: the one exported anew, and the bundle's own through a runtime backend."""

from dataclasses import replace

import numpy as np

from latentrt.plugins.step_graph import LOGITS, StepBatch
from latentrt.runtime.backends.base import Backend
from latentrt.validation.reference.model import Routing, Trace
from latentrt.validation.stages.base import Force, Stage, single_batch
from latentrt.validation.stages.debug_graph import DebugGraph


class GraphStage(Stage):
    """The fp32 step graph exported anew from the checkpoint, with function bodies, on ONNX Runtime."""

    name = "exported graph"

    def __init__(self, debug: DebugGraph, num_pages: int):
        self.debug, self.page_size, self.num_pages = debug, debug.page_size, num_pages
        self.caches = debug.empty_caches(num_pages)

    def step(self, batch: StepBatch) -> np.ndarray:
        return self.debug.run(batch, self.caches)[LOGITS]

    def trace(self, tokens: np.ndarray, force: Force | None = None) -> Trace:
        return _trace(self.debug, tokens, force)


class EngineStage(Stage):
    """The bundle's target through a runtime backend, as a user runs it; traced on its ONNX graph where there is room for it.

    `logit_rows`: most rows of a step that get logits; None where the backend has no limit.
    """

    name = "engine"

    def __init__(self, backend: Backend, debug: DebugGraph | None, logit_rows: int | None = None):
        self.backend, self.debug, self.logit_rows = backend, debug, logit_rows
        self.page_size, self.num_pages = backend.target.cache.page_size, backend.num_pages
        self.can_trace = debug is not None

    def step(self, batch: StepBatch) -> np.ndarray:
        """A step with more logits than an engine gives is run again for the rest: it writes the same tokens once more."""
        rows, most = batch.logit_rows, self.logit_rows or len(batch.logit_rows)
        if len(rows) <= most:
            return self.backend.step(batch).logits().copy()  # the next step may take its memory
        parts = [replace(batch, logit_rows=rows[i : i + most]) for i in range(0, len(rows), most)]
        return np.concatenate([self.backend.step(part).logits().copy() for part in parts])

    def trace(self, tokens: np.ndarray, force: Force | None = None) -> Trace:
        return _trace(self.debug, tokens, force)


def _trace(debug: DebugGraph, tokens: np.ndarray, force: Force | None) -> Trace:
    batch = single_batch(tokens, debug.page_size)
    caches = debug.empty_caches(1 + batch.block_table.shape[1])
    routing = force.routing if force else {}
    values = debug.run(batch, caches, routing, force.hidden if force else None)
    trace = Trace(logits=values[LOGITS])
    for i, names in enumerate(debug.layers):
        trace.attention.append(values[names.attention])
        trace.mlp.append(values[names.mlp])
        trace.hidden.append(values[names.output])
        if names.router_logits:
            ids, weights = (values.get(names.ids), values.get(names.weights))
            if ids is None:
                ids, weights = routing[i].ids, routing[i].weights
            trace.routing[i] = Routing(values[names.router_input], values[names.router_logits], ids, weights)
    return trace
