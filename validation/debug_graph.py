"""A step graph opened up: what every layer puts out becomes a graph output, and routing and layer inputs can be given.

The graph is that of the bundle, its weights are read where they lie, and only graph outputs and inputs are added.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from plugins.contract import DOMAIN
from runtime.backends.base import StepBatch
from validation.errors import ValidationError

_FLOAT, _INT32 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
FORCED = ".forced"


@dataclass(frozen=True)
class LayerValues:
    """Names of one layer's values; the routing's are None in dense layers."""

    attention: str
    output: str
    router_input: str | None = None
    router_logits: str | None = None
    ids: str | None = None
    weights: str | None = None


class DebugGraph:
    """Sessions over one graph, made when first used: free, with forced routing, with forced layer inputs as well."""

    def __init__(self, model: onnx.ModelProto, weights: Path, page_size: int, width: int, cache_dtype: str, threads: int):
        self.model, self.weights_folder, self.threads = model, weights, threads
        self.page_size, self.width, self.cache_dtype = page_size, width, cache_dtype
        self.num_layers = sum(i.name.startswith("latent_cache.") for i in model.graph.input)
        self.layers = [self._find(i) for i in range(self.num_layers)]
        self._sessions: dict[str, ort.InferenceSession] = {}

    def empty_caches(self, num_pages: int) -> list[np.ndarray]:
        """Caches filled with NaN: what is read without having been written shows. Page 0 is scratch."""
        shape = (num_pages, self.page_size, self.width)
        return [np.full(shape, np.nan, np.dtype(self.cache_dtype)) for _ in range(self.num_layers)]

    def run(
        self, batch: StepBatch, caches: list[np.ndarray], routing: Mapping | None = None, hidden: list[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """One step. `caches` are replaced by what the step made of them. Returns logits and all layer values by name.

        `routing` (layer -> Routing) replaces what the routers chose; `hidden` also replaces every layer's input.
        """
        kind = "isolated" if hidden is not None else "routed" if routing else "free"
        session = self._session(kind)
        feeds = dict(vars(batch)) | {f"latent_cache.{i}": c for i, c in enumerate(caches)}
        for layer, given in (routing or {}).items():
            feeds |= {self.layers[layer].ids: given.ids.astype(np.int32), self.layers[layer].weights: given.weights}
        for layer, given in enumerate((hidden or [])[:-1]):
            feeds[self.layers[layer].output + FORCED] = given
        names = [o.name for o in session.get_outputs()]
        taken = {i.name for i in session.get_inputs()}
        values = dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in taken}), strict=True))
        for i in range(self.num_layers):
            caches[i] = values.pop(f"latent_cache.{i}.updated")
        return values

    def _session(self, kind: str) -> ort.InferenceSession:
        if kind not in self._sessions:
            model = onnx.ModelProto()
            model.CopyFrom(self.model)
            if kind != "free":
                _force_routing(model, self.layers)
            if kind == "isolated":
                _force_hidden(model, self.layers)
            _expose(model, (v for names in self.layers for v in vars(names).values() if v))
            self._sessions[kind] = open_session(model, self.weights_folder, self.threads)
        return self._sessions[kind]

    def _find(self, layer: int) -> LayerValues:
        """Value names of a layer, found through the weights and ops that make them."""
        prefix = f"model.layers.{layer}."
        nodes = [n for n in self.model.graph.node if any(o.startswith(prefix) for o in n.output)]
        o_proj = [n for n in nodes if f"{prefix}self_attn.o_proj.weight" in n.input]
        if len(o_proj) != 1 or not any(f"{prefix}output" in n.output for n in self.model.graph.node):
            raise ValidationError(f"graph: layer {layer} has no o_proj product or no value {prefix}output; cannot look inside")
        route = next((n for n in nodes if n.domain == DOMAIN and n.op_type == "MoeRoute"), None)
        if route is None:
            return LayerValues(o_proj[0].output[0], f"{prefix}output")
        experts = next(n for n in nodes if n.domain == DOMAIN and n.op_type == "MoeExperts")
        return LayerValues(o_proj[0].output[0], f"{prefix}output", experts.input[0], route.input[0], *route.output)


def open_session(model: onnx.ModelProto, weights: Path, threads: int) -> ort.InferenceSession:
    """A session over a graph in memory whose external weights lie in the folder `weights`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(Path(weights).resolve()))
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no common base class for its errors
        raise ValidationError(f"onnxruntime {ort.__version__} cannot load the graph for a look inside: {error}") from error


def _force_routing(model: onnx.ModelProto, layers: list[LayerValues]) -> None:
    """The routers' outputs become graph inputs."""
    kept = [n for n in model.graph.node if not (n.domain == DOMAIN and n.op_type == "MoeRoute")]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    for names in layers:
        if names.ids:
            model.graph.input.append(onnx.helper.make_tensor_value_info(names.ids, _INT32, ["T", "top_k"]))
            model.graph.input.append(onnx.helper.make_tensor_value_info(names.weights, _FLOAT, ["T", "top_k"]))


def _force_hidden(model: onnx.ModelProto, layers: list[LayerValues]) -> None:
    """Whoever reads a layer's output reads a graph input instead; the last layer's goes on to the head."""
    inner = {names.output for names in layers[:-1]}
    for node in model.graph.node:
        for k, name in enumerate(node.input):
            if name in inner:
                node.input[k] = name + FORCED
    for name in sorted(inner):
        model.graph.input.append(onnx.helper.make_tensor_value_info(name + FORCED, _FLOAT, ["T", "hidden_size"]))


def _expose(model: onnx.ModelProto, names: Iterable[str]) -> None:
    present = {o.name for o in model.graph.output} | {i.name for i in model.graph.input}
    for name in names:
        if name not in present:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
