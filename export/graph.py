"""The exported step graph: each kind of layer is traced once through torch.export and ONNX, then stamped.

Weights are graph inputs named as `export.models.deepseek_v2.weights` names them; a lowering makes them initializers or
leaves them inputs. Constants are shared between layers. Every node, value and weight of layer i is named `model.layers.i.…`.
"""

import logging
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import torch

from export.config import DeepseekV2Config
from export.models import deepseek_v2
from plugins.contract import DOMAIN, VERSION, onnx_translation
from plugins.mla_attention import formats
from plugins.mla_attention import op as mla_attention
from plugins.moe_experts import op as moe_experts
from plugins.moe_route import op as moe_route

OPSET, IR_VERSION = 23, 11
BATCH_INPUTS = ("input_ids", "positions", "query_starts", "cached_lengths", "block_table", "num_tokens", "logit_rows")
ATTENTION_INPUTS = ("block_table", "cached_lengths", "query_starts", "num_tokens")
LOGITS, LAST_HIDDEN = "logits", "last_hidden"
_OPS = (mla_attention, moe_route, moe_experts)
_SAMPLE = {"T": 5, "B": 3, "N": 2, "max_pages": 4, "num_pages": 7}  # sizes of the traced example; all are dynamic


def cache_name(layer: int) -> str:
    """Graph input of a layer's latent cache; its output has the suffix ".updated"."""
    return f"latent_cache.{layer}"


def build(
    config: DeepseekV2Config, dtype: torch.dtype = torch.float32, cache_format: str = "float32", page_size: int = 64
) -> ir.Model:
    """The step graph of `config` with weights as inputs, activations and weights in `dtype`. See docs/step-graph.md."""
    shapes = _Shapes(config, dtype, cache_format, page_size)
    stamper = _Stamper(config, shapes)
    hidden, cos, sin = stamper.stamp(_trace_embed(shapes), "embed.", dict(stamper.batch))
    layers = {moe: _trace_layer(shapes, moe) for moe in {config.is_moe_layer(i) for i in range(config.num_hidden_layers)}}
    for i in range(config.num_hidden_layers):
        cache = stamper.add_cache(i)
        feeds = stamper.batch | {"hidden": hidden, "cos": cos, "sin": sin, "cache": cache}
        hidden, updated = stamper.stamp(layers[config.is_moe_layer(i)], f"model.layers.{i}.", feeds)
        hidden.name, updated.name = f"model.layers.{i}.output", f"{cache_name(i)}.updated"
        stamper.outputs.append(updated)
    logits, last_hidden = stamper.stamp(_trace_head(shapes), "head.", stamper.batch | {"hidden": hidden})
    logits.name, last_hidden.name = LOGITS, LAST_HIDDEN
    return stamper.finish([logits, last_hidden])


def trace_whole(
    config: DeepseekV2Config, dtype: torch.dtype = torch.float32, cache_format: str = "float32", page_size: int = 64
) -> ir.Model:
    """The same graph traced in one piece: slow, and what the stamped one is tested against."""
    shapes = _Shapes(config, dtype, cache_format, page_size)
    step = _on_meta(lambda: deepseek_v2.DeepseekV2Step(config, cache_format), dtype)
    caches = [shapes.cache() for _ in range(config.num_hidden_layers)]
    arguments = [shapes.batch_input(name) for name in BATCH_INPUTS]
    dynamic = (*[shapes.dynamic(name) for name in BATCH_INPUTS], [shapes.dynamic("cache")] * len(caches))
    names = [*BATCH_INPUTS, *map(cache_name, range(len(caches)))]
    outputs = [LOGITS, LAST_HIDDEN, *[f"{cache_name(i)}.updated" for i in range(len(caches))]]
    model = _trace(step, (*arguments, caches), dynamic, names, outputs)
    for value in list(model.graph.inputs):
        if value.name == "embed.inv_freq":
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(shapes.inv_freq(), name=value.name)
            model.graph.register_initializer(value)
        elif value.name not in names:
            value.name = _weight_name(value.name)
    model.opset_imports[DOMAIN] = VERSION
    return model


@dataclass
class _Shapes:
    """Example arguments and dynamic dimensions of everything that is traced."""

    config: DeepseekV2Config
    dtype: torch.dtype
    cache_format: str
    page_size: int
    dims: dict = field(default_factory=lambda: {n: torch.export.Dim(n, min=1, max=2**31 - 1) for n in _SAMPLE})

    def batch_input(self, name: str) -> torch.Tensor:
        return torch.zeros([_SAMPLE.get(d, d) for d in self._batch_dims(name)], dtype=torch.int32, device="meta")

    def batch_shape(self, name: str) -> list:
        """Shape of a batch input with dynamic dimensions by name."""
        return ["B + 1"] if name == "query_starts" else self._batch_dims(name)

    def dynamic(self, name: str) -> dict:
        if name == "cache":
            return {0: self.dims["num_pages"]}
        if name == "query_starts":
            return {0: self.dims["B"] + 1}
        if name in ("hidden", "cos", "sin"):
            return {0: self.dims["T"]}
        return {axis: self.dims[d] for axis, d in enumerate(self._batch_dims(name)) if d in self.dims}

    def _batch_dims(self, name: str) -> list:
        return {
            "query_starts": [_SAMPLE["B"] + 1], "cached_lengths": ["B"], "block_table": ["B", "max_pages"],
            "num_tokens": [1], "logit_rows": ["N"],
        }.get(name, ["T"])  # fmt: skip

    def cache(self) -> torch.Tensor:
        return torch.zeros(_SAMPLE["num_pages"], *self.page_shape(), dtype=self.cache_dtype, device="meta")

    def page_shape(self) -> tuple[int, int]:
        c = self.config
        return self.page_size, formats.get(self.cache_format).width(c.kv_lora_rank, c.qk_rope_head_dim)

    @property
    def cache_dtype(self) -> torch.dtype:
        return formats.get(self.cache_format).dtype

    def rows(self, width: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(_SAMPLE["T"], width, dtype=dtype, device="meta")

    def inv_freq(self) -> np.ndarray:
        return np.asarray(self.config.rope.inv_freq(self.config.qk_rope_head_dim), np.float32)


def _trace_embed(s: _Shapes) -> ir.Model:
    module = _on_meta(lambda: deepseek_v2.Embed(s.config), s.dtype)
    names = ["input_ids", "positions"]
    arguments = tuple(s.batch_input(n) for n in names)
    model = _trace(module, arguments, tuple(s.dynamic(n) for n in names), names, ["hidden", "cos", "sin"])
    for value in list(model.graph.inputs):
        if value.name == "inv_freq":
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(s.inv_freq(), name=value.name)
            model.graph.register_initializer(value)
    return model


def _trace_layer(s: _Shapes, is_moe: bool) -> ir.Model:
    c = s.config
    module = _on_meta(lambda: deepseek_v2.DecoderLayer(c, is_moe, s.cache_format), s.dtype)
    cos, sin = (s.rows(c.qk_rope_head_dim // 2, torch.float32) for _ in range(2))  # one tensor for both would be merged
    arguments = (s.rows(c.hidden_size, s.dtype), cos, sin, s.cache(), *map(s.batch_input, ATTENTION_INPUTS))
    names = ["hidden", "cos", "sin", "cache", *ATTENTION_INPUTS]
    return _trace(module, arguments, tuple(s.dynamic(n) for n in names), names, ["hidden_out", "cache_out"])


def _trace_head(s: _Shapes) -> ir.Model:
    module = _on_meta(lambda: deepseek_v2.Head(s.config), s.dtype)
    arguments = (s.rows(s.config.hidden_size, s.dtype), s.batch_input("logit_rows"))
    names = ["hidden", "logit_rows"]
    return _trace(module, arguments, tuple(s.dynamic(n) for n in names), names, [LOGITS, LAST_HIDDEN])


def _on_meta(make: Callable[[], torch.nn.Module], dtype: torch.dtype) -> torch.nn.Module:
    """A module without memory: parameters in `dtype`, buffers in their own."""
    with torch.device("meta"):
        module = make().eval()
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(False)
    return module


def _trace(module, arguments, dynamic, input_names, output_names) -> ir.Model:
    """Traces a module on the meta device; its parameters and buffers come out as graph inputs under their own names."""
    table = {getattr(torch.ops.latentrt, op.CONTRACT.name).default: onnx_translation(op.CONTRACT) for op in _OPS}
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module, arguments, dynamo=True, dynamic_shapes=dynamic, custom_translation_table=table, opset_version=OPSET,
            optimize=False, verbose=False, input_names=input_names, output_names=output_names,
        )  # fmt: skip
    graph = program.model.graph
    for name in list(graph.initializers):
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    onnxscript.optimizer.optimize(program.model)
    return program.model


@contextmanager
def _quiet():
    """Mutes the exporter's notes on packages that it would like and on options that it does not use."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "torch.onnx._internal.exporter._registration")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _weight_name(parameter: str) -> str:
    """Name in `weights` of a parameter of DeepseekV2Step: embed.x and layers.x lie under model., head.lm_head does not."""
    parameter = parameter.removeprefix("embed.").removeprefix("head.")
    return parameter if parameter.startswith("lm_head.") else f"model.{parameter}"


class _Stamper:
    """Copies traced parts into one graph, renaming values and sharing constants."""

    def __init__(self, config: DeepseekV2Config, shapes: _Shapes):
        self.shapes = shapes
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []
        self.caches: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.constants: dict[tuple, ir.Value] = {}
        int32 = ir.TensorType(ir.DataType.INT32)
        self.batch = {
            name: ir.Value(name=name, shape=ir.Shape(shapes.batch_shape(name)), type=int32) for name in BATCH_INPUTS
        }

    def add_cache(self, layer: int) -> ir.Value:
        dtype = ir.DataType.from_numpy(np.dtype(str(self.shapes.cache_dtype).removeprefix("torch.")))
        shape = ir.Shape(["num_pages", *self.shapes.page_shape()])
        self.caches.append(ir.Value(name=cache_name(layer), shape=shape, type=ir.TensorType(dtype)))
        return self.caches[-1]

    def stamp(self, part: ir.Model, prefix: str, feeds: dict[str, ir.Value]) -> list[ir.Value]:
        """Appends a copy of `part`; inputs are taken from `feeds`, all others are weights. Returns the outputs."""
        values: dict[ir.Value | None, ir.Value | None] = {None: None}
        for value in part.graph.inputs:
            values[value] = feeds[value.name] if value.name in feeds else self._weight(value, prefix)
        for value in part.graph.initializers.values():
            values[value] = self._constant(value)
        for node in part.graph:
            values |= self._copy(node, prefix, values)
        return [values[output] for output in part.graph.outputs]

    def _copy(self, node: ir.Node, prefix: str, values: dict) -> dict:
        if node.op_type == "Constant":
            return {node.outputs[0]: self._constant(node.outputs[0])}
        copy = ir.Node(
            node.domain, node.op_type, [values[i] for i in node.inputs], list(node.attributes.values()),
            num_outputs=len(node.outputs), name=f"{prefix}{node.name}",
        )  # fmt: skip
        for index, (old, new) in enumerate(zip(node.outputs, copy.outputs, strict=True)):
            new.name, new.shape, new.type = f"{prefix}{_value_name(node, index)}", old.shape, old.type
        self.nodes.append(copy)
        return dict(zip(node.outputs, copy.outputs, strict=True))

    def _weight(self, value: ir.Value, prefix: str) -> ir.Value:
        name = f"{prefix}{value.name}" if prefix.startswith("model.layers.") else _weight_name(value.name)
        self.weights.append(ir.Value(name=name, shape=value.shape, type=value.type))
        return self.weights[-1]

    def _constant(self, value: ir.Value) -> ir.Value:
        array = ir.convenience.get_const_tensor(value).numpy()
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            name = f"constant.{len(self.constants)}"
            tensor = ir.tensor(array, name=name)
            self.constants[key] = ir.Value(
                name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self.constants[key]

    def finish(self, outputs: list[ir.Value]) -> ir.Model:
        inputs = [*self.batch.values(), *self.caches, *self.weights]
        graph = ir.Graph(
            inputs, outputs + self.outputs, nodes=self.nodes, initializers=list(self.constants.values()),
            opset_imports={"": OPSET, DOMAIN: VERSION}, name="deepseek_v2_step",
        )  # fmt: skip
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="latentrt")


def _value_name(node: ir.Node, index: int) -> str:
    """The contract's output name for custom ops, so that validation finds topk_ids; the exporter's name otherwise."""
    for op in _OPS:
        if node.domain == DOMAIN and node.op_type == op.CONTRACT.onnx_type:
            return f"{op.CONTRACT.name}.{op.CONTRACT.outputs[index].name}"
    return node.outputs[index].name
