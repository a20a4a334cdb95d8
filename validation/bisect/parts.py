"""Parts of an engine's step graph: embedding, one layer, head, each a model of its own with that part's weights only.

Only the edges are cut: nodes, attributes, functions and weights are the engine's. Where an own kernel adds two values of one
layer and norms the sum for the next, the sum is taken apart at the edge.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx
from onnx import TensorProto, helper

from latentrt.export.lowering.onnxruntime.native import CPU_DOMAIN
from latentrt.plugins.contract import DOMAIN
from latentrt.plugins.step_graph import (
    LOGITS,
    attention_output,
    cache_name,
    count_caches,
    layer_output,
    layer_prefix,
    mlp_output,
    updated,
)
from latentrt.validation.errors import ValidationError

EMBEDDED = "embed.hidden_out"
ANGLES = ("embed.cos_out", "embed.sin_out")
FUSED_NORM = "SkipSimplifiedLayerNormalization"
OTHER_TERM = "hidden.other_term"  # a zero beside the hidden state where both come in as a sum
_WEIGHT_ONLY = ("Transpose", "Reshape", "Slice", "DequantizeLinear", "Cast", "Identity", "Squeeze", "Unsqueeze", "Gather")


@dataclass(frozen=True)
class Part:
    """A cut-out model. taps: name of a tensor (see reference/layer.py) -> the graph's value; `given`: inputs beside the step's,
    with their ONNX types, to be fed; `weights`: names of initializers and weight inputs."""

    name: str  # "model.layers.3", "embed", "head"
    model: onnx.ModelProto
    taps: dict[str, str]
    given: dict[str, int]
    weights: tuple[str, ...]
    cache: str | None = None
    nodes: dict[str, str] = field(default_factory=dict)  # tap -> name of the node that makes it


class EngineGraph:
    """The engine's whole graph without its weights. `step_inputs`: names of inputs that are not weights."""

    def __init__(self, model: onnx.ModelProto, step_inputs: Iterable[str]):
        self.model, self.step_inputs = model, set(step_inputs)
        self.num_layers = count_caches(i.name for i in model.graph.input)
        self.makers = {name: node for node in model.graph.node for name in node.output if name}
        self.inputs = {i.name: i for i in model.graph.input}
        self.initializers = {t.name: t for t in model.graph.initializer}
        self.types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}

    def part(self, name: str) -> Part:
        """The part of this name."""
        if name in ("embed", "head"):
            return getattr(self, name)()
        return self.layer(int(name.rpartition(".")[2]))

    @property
    def part_names(self) -> list[str]:
        """In the order of the data's way."""
        return ["embed", *(f"model.layers.{k}" for k in range(self.num_layers)), "head"]

    def embed(self) -> Part:
        taps = {"embed_tokens": EMBEDDED, **dict(zip(("cos", "sin"), ANGLES, strict=True))}
        return self._part("embed", taps, ())

    def head(self) -> Part:
        return self._part("head", {"logits": LOGITS}, (self.hidden_before(self.num_layers),))

    def layer(self, index: int) -> Part:
        taps = self._taps(index)
        return self._part(f"model.layers.{index}", taps, (self.hidden_before(index), *ANGLES), cache_name(index))

    def hidden_before(self, layer: int) -> str:
        return layer_output(layer - 1) if layer else EMBEDDED

    def activation(self, layer: int) -> int:
        """ONNX type of the hidden state before a layer."""
        return self.types.get(self.hidden_before(layer), TensorProto.FLOAT)

    def _part(self, name: str, taps: dict[str, str], edge: tuple[str, ...], cache: str | None = None) -> Part:
        wanted = [*taps.values(), *([updated(cache)] if cache else [])]
        missing = [v for v in wanted if v not in self.makers]
        if missing:
            raise ValidationError(f"graph: has no value {missing[0]}, which the comparison looks at; build the bundle again")
        nodes, read = self._cut(wanted, set(edge))
        model = onnx.ModelProto(ir_version=self.model.ir_version)
        model.opset_import.extend(self.model.opset_import)
        model.functions.extend(self.model.functions)
        model.graph.name = name
        model.graph.node.extend(nodes)
        model.graph.initializer.extend(t for n, t in self.initializers.items() if n in read)
        model.graph.value_info.extend(v for v in self.model.graph.value_info if v.name in read)
        model.graph.input.extend(v for n, v in self.inputs.items() if n in read)
        stored = [n for n in read if n in self.inputs and n not in self.step_inputs and n != cache]
        stored += [n for n in read if n in self.initializers and self.initializers[n].data_location == TensorProto.EXTERNAL]
        given = {n: self.types.get(n, TensorProto.FLOAT) for n in (*edge, OTHER_TERM) if n in read}
        model.graph.output.extend(helper.make_empty_tensor_value_info(v) for v in dict.fromkeys(wanted))
        makers = {tap: self.makers[v].name or self.makers[v].op_type for tap, v in taps.items()}
        return Part(name, model, taps, given, tuple(stored), cache, makers)

    def _cut(self, wanted: list[str], edge: set[str]) -> tuple[list[onnx.NodeProto], set[str]]:
        """The nodes that make `wanted` of `edge`, in order, and all values that they read."""
        needed, kept = set(wanted), []
        for node in reversed(self.model.graph.node):
            made = needed.intersection(node.output) - {""} - edge
            if not made:
                continue
            node = self._opened(node, made, edge)
            kept.append(node)
            needed.update(node.input)
        return kept[::-1], {n for node in kept for n in node.input if n}

    def _opened(self, node: onnx.NodeProto, made: set[str], edge: set[str]) -> onnx.NodeProto:
        """A fused sum and norm at an edge: the sum alone at the end of a part, the norm of what is given at its beginning."""
        if node.op_type != FUSED_NORM:
            return node
        total, copy = node.output[3], onnx.NodeProto()
        copy.CopyFrom(node)
        if total in edge:
            copy.input[0], copy.input[1], copy.output[3] = total, OTHER_TERM, f"{total}.again"
        elif made == {total}:
            return helper.make_node("Add", node.input[:2], [total], name=node.name)
        return copy

    def _taps(self, index: int) -> dict[str, str]:
        """What can be looked at in a layer, in the order of the data's way."""
        prefix = layer_prefix(index)
        own = [n for n in self.model.graph.node if any(o.startswith(prefix) for o in n.output)]
        if not own:
            raise ValidationError(f"graph: has no value of layer {index}; build the bundle again")
        attend, route = _only(own, "MlaAttention", "MlaPrefill"), _only(own, "MoeRoute")
        experts = _only(own, "MoeExperts", "Experts")
        at = f"{prefix}self_attn."
        found: dict[str, str | None] = {"input_layernorm": self._product(f"{prefix}input_layernorm.weight")}
        for name in ("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa"):
            found[name] = self._product(f"{at}{name}.weight")
        if attend:
            queries, q_pe, latent, k_pe = attend.input[:4]
            found |= {"latent": latent, "q_pe": q_pe, "k_pe": k_pe}
            if attend.op_type == "MlaAttention":
                found |= {"q_latent": queries, "attended": attend.output[0]}
        found["values"] = self._input(f"{at}o_proj.weight")
        found["attention"] = attention_output(index)
        found["post_attention_layernorm"] = self._product(f"{prefix}post_attention_layernorm.weight")
        if route:
            found |= {"router_logits": route.input[0], "topk_ids": route.output[0], "topk_weights": route.output[1]}
            found["experts"] = experts.output[0]
        for block in ("", "shared_experts."):
            for name in ("gate_proj", "up_proj", "down_proj"):
                found[f"{block}{name}"] = self._product(f"{prefix}mlp.{block}{name}.weight")
        found |= {"mlp": mlp_output(index), "hidden": layer_output(index)}
        return {tap: value for tap, value in found.items() if value}

    def _product(self, weight: str) -> str | None:
        """What a node makes of a weight and activations; of several (weight, scale, bias) the last one, and its cast."""
        names = [n for n in (weight, f"{weight}.scale", weight.replace(".weight", ".bias")) if self._known(n)]
        users = [self._users(n) for n in names]
        if not names or not all(users):
            return None
        node, place = users[-1]
        output = self._output(node, place)
        after = [n for n in self.model.graph.node if output in n.input]
        wide = len(users) > 1 and node.op_type in ("Mul", "Add") and len(after) == 1 and after[0].op_type == "Cast"
        return after[0].output[0] if wide else output

    def _output(self, node: onnx.NodeProto, place: int) -> str | None:
        """Own kernels make two products of one input in one node, and of a gated MLP the last only."""
        if node.op_type == "LinearPair":
            return node.output[(place - 1) // 2]
        if node.op_type == "GatedMlp":
            return node.output[0] if place >= 5 else None
        return None if node.op_type in ("Mla", "MlaHalf", "MlaPacked") else node.output[0]

    def _input(self, weight: str) -> str | None:
        """What is multiplied with a weight, before it is quantized."""
        if not self._known(weight) or self._users(weight) is None:
            return None
        value = self._users(weight)[0].input[0]
        while (node := self.makers.get(value)) is not None and _quantizes(node):
            value = node.input[0]
        return value

    def _known(self, name: str) -> bool:
        return name in self.inputs or name in self.initializers

    def _users(self, name: str) -> tuple[onnx.NodeProto, int] | None:
        """The node that brings a weight and activations together, and the weight's place among its inputs."""
        for node in self.model.graph.node:
            if name in node.input:
                others = [v for v in node.input if v and v != name]
                turns = node.op_type in _WEIGHT_ONLY and all(self._fixed(v) for v in others)
                return self._users(node.output[0]) if turns else (node, list(node.input).index(name))
        return None

    def _fixed(self, name: str) -> bool:
        node = self.makers.get(name)
        return self._known(name) if node is None else node.op_type == "Constant"


def _quantizes(node: onnx.NodeProto) -> bool:
    if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
        return True
    return node.op_type in ("Div", "Cast") and ".x_" in node.name


def _only(nodes: Iterable[onnx.NodeProto], *op_types: str) -> onnx.NodeProto | None:
    """The node that is this custom op, or own kernels' of the name."""
    return next((n for n in nodes if n.domain in (DOMAIN, CPU_DOMAIN) and n.op_type in op_types), None)
