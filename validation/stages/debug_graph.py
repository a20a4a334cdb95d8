"""A step graph opened up: what every layer puts out becomes a graph output, and routing and layer inputs can be given.

The graph is that of the bundle, its weights are read where they lie, and only graph outputs and inputs are added. ONNX
Runtime runs it where it has function bodies (`OnnxRuntimeGraph`), PyTorch where it is a GPU engine's (`TorchGraph`).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch

from latentrt.export.lowering.onnxruntime.native import CPU_DOMAIN
from latentrt.plugins.contract import DOMAIN
from latentrt.plugins.cpu import compile as own_kernels
from latentrt.plugins.moe_experts.op import CONTRACT as MOE_EXPERTS
from latentrt.plugins.moe_route.op import CONTRACT as MOE_ROUTE
from latentrt.plugins.step_graph import (
    TOKENS,
    StepBatch,
    attention_output,
    count_caches,
    layer_output,
    layer_prefix,
    mlp_output,
)  # fmt: skip
from latentrt.plugins.step_graph import caches as cache_names
from latentrt.runtime.backends.torch.graph import StepProgram
from latentrt.runtime.backends.torch.ops import DTYPES
from latentrt.validation.bisect.parts import FUSED_NORM
from latentrt.validation.errors import ValidationError

_FLOAT, _INT32 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
FORCED = ".forced"
OWN_EXPERTS = "Experts"
Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class LayerValues:
    """Names of one layer's values; the routing's are None in dense layers."""

    attention: str
    mlp: str
    output: str
    router_input: str | None = None
    router_logits: str | None = None
    ids: str | None = None
    weights: str | None = None


class DebugGraph(ABC):
    """One graph in three forms, made when they are used: free, with forced routing, with forced layer inputs as well."""

    def __init__(self, model: onnx.ModelProto, page_size: int, width: int):
        self.model, self.page_size, self.width = model, page_size, width
        self.num_layers = count_caches(i.name for i in model.graph.input)
        self.cache_names = cache_names(self.num_layers)
        self.layers = [self._find(i) for i in range(self.num_layers)]

    @abstractmethod
    def empty_caches(self, num_pages: int) -> list:
        """Caches filled with NaN: what is read without having been written shows. Page 0 is scratch."""

    @abstractmethod
    def execute(self, form: str, feeds: Feeds, caches: list) -> dict[str, np.ndarray]:
        """Runs one form. `caches` are replaced by what the step made of them. Returns outputs by name, the caches left out."""

    def run(
        self, batch: StepBatch, caches: list, routing: Mapping | None = None, hidden: list[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """One step; logits and all layer values by name.

        `routing` (layer -> Routing) replaces what the routers chose; `hidden` also replaces every layer's input.
        """
        feeds = dict(vars(batch))
        for layer, given in (routing or {}).items():
            feeds |= {self.layers[layer].ids: given.ids.astype(np.int32), self.layers[layer].weights: given.weights}
        for layer, given in enumerate((hidden or [])[:-1]):
            feeds[self.layers[layer].output + FORCED] = given
        return self.execute("isolated" if hidden is not None else "routed" if routing else "free", feeds, caches)

    def _take_caches(self, values: dict, caches: list) -> None:
        """Moves the outputs that are caches from `values` to `caches`."""
        caches[:] = [values.pop(name) for name in self.cache_names.values()]

    def form(self, form: str) -> onnx.ModelProto:
        """A copy of the graph in one of its forms."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        if form != "free":
            _force_routing(model, self.layers)
        if form == "isolated":
            _force_hidden(model, self.layers)
        _expose(model, (v for names in self.layers for v in vars(names).values() if v))
        return model

    def _find(self, layer: int) -> LayerValues:
        """Value names of a layer. ValidationError if one is missing."""
        nodes = [n for n in self.model.graph.node if any(o.startswith(layer_prefix(layer)) for o in n.output)]
        made = {o for n in nodes for o in n.output}
        names = attention_output(layer), mlp_output(layer), layer_output(layer)
        missing = [name for name in names if name not in made]
        if missing:
            raise ValidationError(f"graph: has no value {missing[0]}, which the comparison looks at; build the bundle again")
        route = _only(nodes, MOE_ROUTE.onnx_type)
        if route is None:
            return LayerValues(*names)
        return LayerValues(*names, _only(nodes, MOE_EXPERTS.onnx_type, OWN_EXPERTS).input[0], route.input[0], *route.output)


class OnnxRuntimeGraph(DebugGraph):
    """A graph with function bodies whose external weights lie in the folder `weights`."""

    def __init__(self, model: onnx.ModelProto, weights: Path, page_size: int, width: int, cache_dtype: str, threads: int):
        super().__init__(model, page_size, width)
        self.weights_folder, self.cache_dtype, self.threads = weights, cache_dtype, threads
        self._sessions: dict[str, ort.InferenceSession] = {}

    def empty_caches(self, num_pages: int) -> list[np.ndarray]:
        shape = (num_pages, self.page_size, self.width)
        kind = np.dtype(self.cache_dtype)
        nothing = np.nan if kind.kind == "f" else -1  # a packed format's scales are NaN then
        return [np.full(shape, nothing, kind) for _ in range(self.num_layers)]

    def execute(self, form: str, feeds: Feeds, caches: list[np.ndarray]) -> dict[str, np.ndarray]:
        if form not in self._sessions:
            self._sessions[form] = open_session(self.form(form), self.weights_folder, self.threads)
        session = self._sessions[form]
        given = dict(feeds) | dict(zip(self.cache_names, caches, strict=True))
        names = [o.name for o in session.get_outputs()]
        taken = {i.name for i in session.get_inputs()}
        values = dict(zip(names, session.run(names, {k: v for k, v in given.items() if k in taken}), strict=True))
        self._take_caches(values, caches)
        return values


class TorchGraph(DebugGraph):
    """A GPU engine's graph, interpreted as the torch backend does it: Triton kernels on a GPU, plain torch on the CPU.

    One form is kept at a time, since merged and decoded weights are copies.
    """

    def __init__(
        self, model: onnx.ModelProto, weights: Mapping[str, torch.Tensor], page_size: int, width: int, cache_dtype: str,
        device: torch.device,
    ):  # fmt: skip
        super().__init__(model, page_size, width)
        self.weights, self.device, self.cache_dtype = weights, device, getattr(torch, cache_dtype)
        self._types = {v.name: DTYPES[v.type.tensor_type.elem_type] for v in model.graph.value_info}
        self._program: tuple[str, StepProgram] | None = None

    def empty_caches(self, num_pages: int) -> list[torch.Tensor]:
        shape = (num_pages, self.page_size, self.width)
        nothing = torch.nan if self.cache_dtype.is_floating_point else -1  # a packed format's scales are NaN then
        return [torch.full(shape, nothing, dtype=self.cache_dtype, device=self.device) for _ in range(self.num_layers)]

    @torch.inference_mode()
    def execute(self, form: str, feeds: Feeds, caches: list[torch.Tensor]) -> dict[str, np.ndarray]:
        if self._program is None or self._program[0] != form:
            self._program = None  # before the next is made: both may not fit
            kind = "triton" if self.device.type == "cuda" else "reference"
            self._program = form, StepProgram(self.form(form), self.weights, self.device, kind)
        given = {name: self._placed(name, value) for name, value in feeds.items()}
        values = self._program[1].run(given | dict(zip(self.cache_names, caches, strict=True)))
        self._take_caches(values, caches)
        return {name: v.float().cpu().numpy() if v.is_floating_point() else v.cpu().numpy() for name, v in values.items()}

    def _placed(self, name: str, value: np.ndarray) -> torch.Tensor:
        """A fed value on the device; hidden states in the type of the graph's own, as the layer before would hand them on."""
        tensor = torch.from_numpy(value).to(self.device)
        return tensor.to(self._types[name.removesuffix(FORCED)]) if name.endswith(FORCED) else tensor


def open_session(model: onnx.ModelProto, weights: Path, threads: int) -> ort.InferenceSession:
    """A session over a graph in memory whose external weights lie in the folder `weights`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(Path(weights).resolve()))
    if any(node.domain == CPU_DOMAIN for node in model.graph.node):
        options.register_custom_ops_library(str(own_kernels.library()))
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no common base class for its errors
        raise ValidationError(f"onnxruntime {ort.__version__} cannot load the graph for a look inside: {error}") from error


def _only(nodes: Iterable[onnx.NodeProto], *op_types: str) -> onnx.NodeProto | None:
    """The node that is this custom op, or own kernels' of the name."""
    return next((n for n in nodes if n.domain in (DOMAIN, CPU_DOMAIN) and n.op_type in op_types), None)


def _force_routing(model: onnx.ModelProto, layers: list[LayerValues]) -> None:
    """The routers' outputs become graph inputs."""
    kept = [n for n in model.graph.node if n is not _only([n], MOE_ROUTE.onnx_type)]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    for names in layers:
        if names.ids:
            model.graph.input.append(onnx.helper.make_tensor_value_info(names.ids, _INT32, [TOKENS, "top_k"]))
            model.graph.input.append(onnx.helper.make_tensor_value_info(names.weights, _FLOAT, [TOKENS, "top_k"]))


def _force_hidden(model: onnx.ModelProto, layers: list[LayerValues]) -> None:
    """Whoever reads a layer's output reads a graph input instead; the last layer's goes on to the head."""
    inner = {names.output for names in layers[:-1]}
    nodes = [part for node in model.graph.node for part in _opened(node, inner)]
    for node in nodes:
        for k, name in enumerate(node.input):
            if name in inner:
                node.input[k] = name + FORCED
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for name in sorted(inner):
        model.graph.input.append(onnx.helper.make_tensor_value_info(name + FORCED, _FLOAT, [TOKENS, "hidden_size"]))


def _opened(node: onnx.NodeProto, inner: set[str]) -> list[onnx.NodeProto]:
    """Where an own kernel adds for one layer and norms the sum for the next: the sum, and the norm of what is given."""
    if node.op_type != FUSED_NORM or node.output[3] not in inner:
        return [node]
    total, norm = node.output[3], onnx.NodeProto()
    norm.CopyFrom(node)
    norm.input[0], norm.input[1], norm.output[3] = total, f"{total}.nothing", f"{total}.again"
    added = onnx.helper.make_node("Add", node.input[:2], [total])
    return [added, onnx.helper.make_node("Sub", [total, total], [f"{total}.nothing"]), norm]


def _expose(model: onnx.ModelProto, names: Iterable[str]) -> None:
    present = {o.name for o in model.graph.output} | {i.name for i in model.graph.input}
    for name in names:
        if name not in present:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
