"""Traces the parts of a model family on the meta device, through torch.export, to onnx-ir.

Parameters come out as graph inputs under their own names, so that no memory is needed for weights; buffers as constants.
"""

import logging
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from latentrt.export.models import registry
from latentrt.export.models.base import Config, Family, page_shape
from latentrt.plugins import cache_formats, ops
from latentrt.plugins.contract import OpContract, onnx_translation
from latentrt.plugins.step_graph import DYNAMIC, LAST_HIDDEN, LOGITS, NUM_PAGES, TOKENS, Dim, inputs, size

OPSET = 23
HIDDEN, CACHE = "hidden", "cache"
LAYER_OUTPUTS = ("hidden_out", "cache_out", "attention_out", "mlp_out")
_SAMPLE = dict(zip(DYNAMIC, (5, 3, 2, 4, 7), strict=True))  # sizes of the traced example, all different


@dataclass(frozen=True)
class Value:
    """Dimensions and dtype of something that a part takes."""

    dims: tuple[Dim, ...]
    dtype: torch.dtype

    def example(self) -> torch.Tensor:
        """A new tensor every time: torch.export merges inputs that are one tensor."""
        return torch.zeros([size(d, _SAMPLE) for d in self.dims], dtype=self.dtype, device="meta")

    def as_input(self, name: str) -> ir.Value:
        """The graph input `name`."""
        dtype = ir.DataType.from_numpy(np.dtype(str(self.dtype).removeprefix("torch.")))
        return ir.Value(name=name, shape=ir.Shape(self.dims), type=ir.TensorType(dtype))


@dataclass
class Shapes:
    """Everything that parts take, by name: the step's inputs, what the embedding gives to layers, a layer's cache."""

    config: Config
    dtype: torch.dtype
    cache_format: str
    page_size: int
    ranks: int = 1  # which share the experts
    dims: dict = field(default_factory=lambda: {n: torch.export.Dim(n, min=1, max=2**31 - 1) for n in DYNAMIC})

    @property
    def family(self) -> Family:
        return registry.of(self.config)

    @cached_property
    def values(self) -> dict[str, Value]:
        page = page_shape(self.config, self.cache_format, self.page_size)
        return {
            **{name: Value(dims, torch.int32) for name, dims in self.inputs.items()},
            HIDDEN: Value((TOKENS, self.config.hidden_size), self.dtype),
            **{name: Value((TOKENS, width), torch.float32) for name, width in self.angles.items()},
            CACHE: Value((NUM_PAGES, *page), cache_formats.get(self.cache_format).dtype),
        }

    @property
    def inputs(self) -> dict[str, tuple[Dim, ...]]:
        """Dimensions of what every part takes, by name."""
        return inputs(self.ranks)

    @property
    def angles(self) -> dict[str, int]:
        return self.family.angles(self.config)

    def batch(self) -> dict[str, torch.Tensor]:
        """Examples of the step's inputs."""
        return {name: self.values[name].example() for name in self.inputs}

    def dynamic(self, name: str) -> dict:
        """Dynamic axes of `values[name]`, in torch.export's words."""
        dims = enumerate(self.values[name].dims)
        return {axis: self.dims.get(d) or size(d, self.dims) for axis, d in dims if isinstance(d, str)}


def trace_embed(s: Shapes) -> ir.Model:
    """Outputs are named as what layers take, with the suffix "_out"."""
    return _trace_part(s, lambda: s.family.embed(s.config), (), [f"{name}_out" for name in (HIDDEN, *s.angles)])


def trace_layer(s: Shapes, kind: Hashable, form: str) -> ir.Model:
    """One kind of layer in one form of attention, with LAYER_OUTPUTS."""
    takes = HIDDEN, *s.angles, CACHE
    return _trace_part(s, lambda: s.family.layer(s.config, kind, s.cache_format, form, s.ranks), takes, LAYER_OUTPUTS)


def trace_head(s: Shapes) -> ir.Model:
    return _trace_part(s, lambda: s.family.head(s.config), (HIDDEN,), (LOGITS, LAST_HIDDEN))


@dataclass(frozen=True)
class OpCall:
    """A custom op as a layer calls it: shapes and dtypes of the tensors that are given, by the contract's names."""

    contract: OpContract
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]  # torch's words
    attributes: dict


def op_calls(s: Shapes, kinds: Iterable[Hashable], form: str) -> list[OpCall]:
    """The custom ops of each kind of layer, from a run on the meta device: a matter of milliseconds."""
    calls: list[OpCall] = []
    for kind in kinds:
        layer, _ = _on_meta(partial(s.family.layer, s.config, kind, s.cache_format, form, s.ranks), s.dtype)
        with _Recorder(calls), torch.no_grad():
            layer(*(s.values[name].example() for name in (HIDDEN, *s.angles, CACHE)), s.batch())
    return calls


class _Recorder(TorchDispatchMode):
    """Notes every custom op that is called inside."""

    def __init__(self, calls: list[OpCall]):
        super().__init__()
        self.calls = calls
        self.contracts = {getattr(torch.ops.latentrt, c.name).default: c for c in ops.contracts().values()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.contracts:
            self.calls.append(self._call(self.contracts[func], args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _call(self, contract: OpContract, args: tuple, kwargs: dict) -> OpCall:
        names = [spec.name for spec in (*contract.inputs, *contract.attributes)]
        defaults = {a.name: a.default for a in contract.attributes}
        given = defaults | dict(zip(names, args, strict=False)) | kwargs
        tensors = {spec.name: given[spec.name] for spec in contract.inputs if given.get(spec.name) is not None}
        return OpCall(
            contract, {name: tuple(t.shape) for name, t in tensors.items()},
            {name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()},
            {a.name: given[a.name] for a in contract.attributes},
        )  # fmt: skip


def _trace_part(s: Shapes, make: Callable[[], nn.Module], takes: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """All parts take the batch beside what `takes` names."""
    arguments = *(s.values[name].example() for name in takes), s.batch()
    dynamic = *(s.dynamic(name) for name in takes), {name: s.dynamic(name) for name in s.inputs}
    return trace(make, s.dtype, arguments, dynamic, [*takes, *s.inputs], outputs)


def trace(
    make: Callable[[], nn.Module], dtype: torch.dtype, arguments: tuple, dynamic: tuple, input_names: Sequence[str],
    output_names: Sequence[str],
) -> ir.Model:  # fmt: skip
    """Traces the module that `make` makes, with parameters in `dtype`. They come out as graph inputs under their own names.

    Buffers become constants; `make` must have given them values, on the CPU, in spite of the device being meta.
    """
    module, buffers = _on_meta(make, dtype)
    table = {getattr(torch.ops.latentrt, c.name).default: onnx_translation(c) for c in ops.contracts().values()}
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module, (*arguments, {}), dynamo=True, dynamic_shapes=dynamic, custom_translation_table=table, opset_version=OPSET,
            optimize=False, verbose=False, input_names=input_names, output_names=output_names,
        )  # fmt: skip
    graph = program.model.graph
    for name in list(graph.initializers):
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    onnxscript.optimizer.optimize(program.model)
    for value in [v for v in graph.inputs if v.name in buffers]:
        graph.inputs.remove(value)
        value.const_value = ir.tensor(buffers[value.name], name=value.name)
        graph.register_initializer(value)
    return program.model


def _on_meta(make: Callable[[], nn.Module], dtype: torch.dtype) -> tuple[nn.Module, dict[str, np.ndarray]]:
    """A module without memory, parameters in `dtype`, and the values of its buffers, which keep their own."""
    with torch.device("meta"):
        module = make().eval()
    buffers = {name: buffer.numpy() for name, buffer in module.named_buffers()}
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(False)
    return module.to("meta"), buffers


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
