"""The links of the chain after the reference: our torch model, the exported graph, the engine. Each runs the same steps.

A stage gives logits through a `runtime` backend in three modes (prefill, chunked, decode) and traces: what every layer put
out, with routing or every layer's input taken from the reference where asked.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import onnx
import torch

from export.checkpoint import Checkpoint
from export.config import DeepseekV2Config
from export.models import deepseek_v2
from plugins.mla_attention import formats
from runtime.backends.base import Backend, SequenceRows, StepBatch
from runtime.latent_cache import LatentCache
from validation.debug_graph import DebugGraph
from validation.reference import Routing, Trace

PAGE_SIZE = 64


@dataclass(frozen=True)
class Force:
    """What a traced run takes from the reference instead of computing it: the routing, or every layer's input as well."""

    routing: Mapping[int, Routing]
    hidden: list[np.ndarray] | None = None  # reference hidden states after each layer


class Stage:
    """A link. `prefill`, `chunked` and `decode` need `step`; `trace` needs a debuggable form (`can_trace`)."""

    name: str
    page_size: int
    num_pages: int

    def step(self, batch: StepBatch) -> np.ndarray:
        """Runs one step; appends to the cache. Returns logits [N, vocab_size]."""
        raise NotImplementedError

    def trace(self, tokens: np.ndarray, force: Force | None = None) -> Trace:
        """One prefill of tokens [T] with everything on the way."""
        raise NotImplementedError

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """All of tokens [T] in one step -> logits [T, vocab_size]."""
        return next(iter(self._run([tokens], lambda done, length: length - done)))

    def chunked(self, windows: list[np.ndarray], seed: int = 0) -> list[np.ndarray]:
        """Ragged chunks of odd lengths, several sequences in a step, with pages taken in turn (so out of order)."""
        rng = np.random.default_rng(seed)
        return list(self._run(windows, lambda done, length: min(length - done, int(rng.choice([1, 2, 7, 33, 64, 129])))))

    def decode(self, windows: list[np.ndarray], steps: int) -> list[np.ndarray]:
        """All but the last `steps` tokens in one step, those token by token over the cache, all sequences side by side."""
        return list(self._run(windows, lambda done, length: max(1, length - steps) if done == 0 else 1))

    def _run(self, windows: list[np.ndarray], take: Callable[[int, int], int]) -> Iterator[np.ndarray]:
        cache = LatentCache(self.num_pages, self.page_size)
        done = [0] * len(windows)
        logits: list[list[np.ndarray]] = [[] for _ in windows]
        while active := [s for s, w in enumerate(windows) if done[s] < len(w)]:
            counts = [take(done[s], len(windows[s])) for s in active]
            rows = []
            for s, count in zip(active, counts, strict=True):
                cache.reserve(s, done[s] + count)
                rows.append(SequenceRows(windows[s][done[s] : done[s] + count].tolist(), done[s], range(count)))
            out = self.step(StepBatch.of(rows, cache.block_table(active)))
            for s, piece in zip(active, np.split(out, np.cumsum(counts)[:-1]), strict=True):
                logits[s].append(piece.copy())
                done[s] += len(piece)
        return (np.concatenate(rows) for rows in logits)


class EngineStage(Stage):
    """The bundle's target through a runtime backend, as a user runs it; traced on its ONNX graph where there is room for it.

    `logit_rows`: most rows of a step that get logits; None where the backend has no limit.
    """

    name = "engine"

    def __init__(self, backend: Backend, debug: "DebugGraph | None", logit_rows: int | None = None):
        self.backend, self.debug, self.logit_rows = backend, debug, logit_rows
        self.page_size, self.num_pages = backend.target.cache.page_size, backend.num_pages

    def step(self, batch: StepBatch) -> np.ndarray:
        """A step with more logits than an engine gives is run again for the rest: it writes the same tokens once more."""
        rows, most = batch.logit_rows, self.logit_rows or len(batch.logit_rows)
        parts = [replace(batch, logit_rows=rows[i : i + most]) for i in range(0, len(rows), most)]
        return np.concatenate([self.backend.step(part) for part in parts]) if len(parts) > 1 else self.backend.step(batch)

    def trace(self, tokens: np.ndarray, force: Force | None = None) -> Trace:
        return _trace_graph(self.debug, tokens, force)


class GraphStage(Stage):
    """The fp32 step graph exported anew from the checkpoint, with function bodies, on ONNX Runtime."""

    name = "exported graph"

    def __init__(self, debug: DebugGraph, num_pages: int):
        self.debug, self.page_size, self.num_pages = debug, debug.page_size, num_pages
        self.caches = debug.empty_caches(num_pages)

    def step(self, batch: StepBatch) -> np.ndarray:
        return self.debug.run(batch, self.caches)["logits"]

    def trace(self, tokens: np.ndarray, force: Force | None = None) -> Trace:
        return _trace_graph(self.debug, tokens, force)


def single_batch(tokens: np.ndarray, page_size: int) -> StepBatch:
    """One sequence, all logits, pages 1, 2, ..."""
    pages = 1 + np.arange(-(-len(tokens) // page_size))[None]
    return StepBatch.of([SequenceRows(tokens.tolist(), 0, range(len(tokens)))], pages)


def _trace_graph(debug: DebugGraph, tokens: np.ndarray, force: Force | None) -> Trace:
    batch = single_batch(tokens, debug.page_size)
    caches = debug.empty_caches(1 + batch.block_table.shape[1])
    routing = force.routing if force else {}
    values = debug.run(batch, caches, routing, force.hidden if force else None)
    trace = Trace(logits=values["logits"])
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


class ModelStage(Stage):
    """Our torch definition in float32 on the checkpoint's weights."""

    name = "torch model"
    page_size = PAGE_SIZE

    def __init__(self, checkpoint: Checkpoint, num_pages: int):
        self.config: DeepseekV2Config = checkpoint.config
        self.num_pages = num_pages
        self.module = deepseek_v2.DeepseekV2Step(self.config).load_weights(checkpoint.read).eval()
        self.caches = self._empty_caches(num_pages)

    def _empty_caches(self, num_pages: int) -> list[torch.Tensor]:
        width = formats.get("float32").width(self.config.kv_lora_rank, self.config.qk_rope_head_dim)
        return [torch.zeros(num_pages, self.page_size, width) for _ in range(self.config.num_hidden_layers)]

    @torch.no_grad()
    def step(self, batch: StepBatch) -> np.ndarray:
        logits, _, self.caches = self.module(**_tensors(batch), caches=self.caches)
        return logits.numpy()

    @torch.no_grad()
    def trace(self, tokens: np.ndarray, force: Force | None = None) -> Trace:
        trace, handles, routed = Trace(), [], []
        batch = single_batch(tokens, self.page_size)
        for index, layer in enumerate(self.module.layers):
            handles.append(layer.register_forward_hook(lambda m, a, out: trace.hidden.append(out[0].numpy())))
            handles.append(layer.self_attn.register_forward_hook(lambda m, a, out: trace.attention.append(out[0].numpy())))
            handles.append(layer.mlp.register_forward_hook(lambda m, a, out: trace.mlp.append(out.numpy())))
            if force and force.hidden and index:
                given = torch.from_numpy(force.hidden[index - 1])
                handles.append(layer.register_forward_pre_hook(lambda m, a, given=given: (given, *a[1:])))
            if hasattr(layer.mlp, "gate"):
                handles.append(layer.mlp.register_forward_pre_hook(lambda m, a, i=index: routed.append((i, a[0].numpy()))))
        with mock.patch.object(deepseek_v2, "moe_route", self._tap(trace, routed, force)):
            try:
                caches = self._empty_caches(1 + batch.block_table.shape[1])
                trace.logits = self.module(**_tensors(batch), caches=caches)[0].numpy()
            finally:
                for handle in handles:
                    handle.remove()
        return trace

    def _tap(self, trace: Trace, routed: list, force: Force | None):
        """moe_route that notes what it does, and answers with the reference's choice where that is forced."""
        real = deepseek_v2.moe_route

        def route(logits, *args, **kwargs):
            layer, router_input = routed[-1]
            ids, weights = real(logits, *args, **kwargs)
            if force:
                ids, weights = (torch.from_numpy(v) for v in (force.routing[layer].ids, force.routing[layer].weights))
            trace.routing[layer] = Routing(router_input, logits.numpy(), ids.numpy(), weights.numpy())
            return ids, weights

        return route


def _tensors(batch: StepBatch) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in vars(batch).items()}


def load_onnx(path) -> onnx.ModelProto:
    """A step graph without its weights, which stay in the files beside it."""
    return onnx.load(str(path), load_external_data=False)
