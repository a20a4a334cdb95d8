"""The second link: our torch definition in float32 on the checkpoint's weights."""

from collections.abc import Callable

import numpy as np
import torch

from latentrt.export.checkpoint import Checkpoint
from latentrt.export.models import registry
from latentrt.export.models.base import page_shape
from latentrt.plugins.step_graph import StepBatch
from latentrt.validation.reference.model import Routing, Trace
from latentrt.validation.stages.base import PAGE_SIZE, Force, Stage, single_batch


class ModelStage(Stage):
    """The family's whole step, as it is traced for export."""

    name = "torch model"
    page_size = PAGE_SIZE

    def __init__(self, checkpoint: Checkpoint, num_pages: int):
        self.config, self.num_pages = checkpoint.config, num_pages
        self.module = registry.of(self.config).step(self.config).load_weights(checkpoint.read).eval()
        self.caches = self._empty_caches(num_pages)

    def _empty_caches(self, num_pages: int) -> list[torch.Tensor]:
        shape = num_pages, *page_shape(self.config, "float32", self.page_size)
        return [torch.zeros(shape) for _ in range(self.config.num_hidden_layers)]

    @torch.no_grad()
    def step(self, batch: StepBatch) -> np.ndarray:
        logits, _, self.caches = self.module(_tensors(batch), self.caches)
        return logits.numpy()

    @torch.no_grad()
    def trace(self, tokens: np.ndarray, force: Force | None = None) -> Trace:
        trace, handles = Trace(), []
        batch = single_batch(tokens, self.page_size)
        layers = list(enumerate(self.module.layers))
        for index, layer in layers:
            handles.append(layer.register_forward_hook(lambda module, inputs, outputs: _note(trace, outputs)))
            if force and force.hidden and index:
                given = torch.from_numpy(force.hidden[index - 1])
                handles.append(layer.register_forward_pre_hook(lambda module, inputs, given=given: (given, *inputs[1:])))
        taps = [_Tap(layer.mlp, index, trace, force) for index, layer in layers if hasattr(layer.mlp, "route")]
        try:
            caches = self._empty_caches(1 + batch.block_table.shape[1])
            trace.logits = self.module(_tensors(batch), caches)[0].numpy()
        finally:
            for handle in (*handles, *taps):
                handle.remove()
        return trace


def _note(trace: Trace, outputs: tuple[torch.Tensor, ...]) -> None:
    """What a layer gives: hidden, its cache, and what attention and MLP add."""
    hidden, _, attention, mlp = outputs
    trace.hidden.append(hidden.numpy())
    trace.attention.append(attention.numpy())
    trace.mlp.append(mlp.numpy())


class _Tap:
    """Stands in for a block's routing op until it is removed: notes what goes in and out, or answers what is forced."""

    def __init__(self, block: torch.nn.Module, layer: int, trace: Trace, force: Force | None):
        self.block, self.layer, self.trace, self.force = block, layer, trace, force
        self.op: Callable = block.route
        self.hook = block.register_forward_pre_hook(lambda module, inputs: setattr(self, "input", inputs[0]))
        block.route = self

    def __call__(self, logits: torch.Tensor, *inputs, **attributes) -> tuple[torch.Tensor, torch.Tensor]:
        ids, weights = self.op(logits, *inputs, **attributes)
        if self.force:
            given = self.force.routing[self.layer]
            ids, weights = torch.from_numpy(given.ids), torch.from_numpy(given.weights)
        self.trace.routing[self.layer] = Routing(self.input.numpy(), logits.numpy(), ids.numpy(), weights.numpy())
        return ids, weights

    def remove(self) -> None:
        self.hook.remove()
        self.block.route = self.op


def _tensors(batch: StepBatch) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in vars(batch).items()}
