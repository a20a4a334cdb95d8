"""Traces modules of the model definition on the meta device: shapes of their arguments, and torch.export to onnx-ir.

Parameters come out as graph inputs under their own names, so that no memory is needed for weights.
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
from plugins.contract import onnx_translation
from plugins.mla_attention import formats
from plugins.mla_attention import op as mla_attention
from plugins.mla_prefill import op as mla_prefill
from plugins.moe_experts import op as moe_experts
from plugins.moe_route import op as moe_route

OPSET = 23
CUSTOM_OPS = (mla_attention, mla_prefill, moe_route, moe_experts)
BATCH_INPUTS = ("input_ids", "positions", "query_starts", "cached_lengths", "block_table", "num_tokens", "logit_rows")
ATTENTION_INPUTS = ("block_table", "cached_lengths", "query_starts", "num_tokens")
LOGITS, LAST_HIDDEN = "logits", "last_hidden"
_SAMPLE = {"T": 5, "B": 3, "N": 2, "max_pages": 4, "num_pages": 7}  # sizes of the traced example; all are dynamic


@dataclass
class Shapes:
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


def trace_embed(s: Shapes) -> ir.Model:
    module = on_meta(lambda: deepseek_v2.Embed(s.config), s.dtype)
    names = ["input_ids", "positions"]
    arguments = tuple(s.batch_input(n) for n in names)
    model = trace(module, arguments, tuple(s.dynamic(n) for n in names), names, ["hidden", "cos", "sin"])
    for value in list(model.graph.inputs):
        if value.name == "inv_freq":
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(s.inv_freq(), name=value.name)
            model.graph.register_initializer(value)
    return model


def trace_layer(s: Shapes, is_moe: bool, form: str) -> ir.Model:
    c = s.config
    module = on_meta(lambda: deepseek_v2.DecoderLayer(c, is_moe, s.cache_format, form), s.dtype)
    cos, sin = (s.rows(c.qk_rope_head_dim // 2, torch.float32) for _ in range(2))  # one tensor for both would be merged
    arguments = (s.rows(c.hidden_size, s.dtype), cos, sin, s.cache(), *map(s.batch_input, ATTENTION_INPUTS))
    names = ["hidden", "cos", "sin", "cache", *ATTENTION_INPUTS]
    return trace(module, arguments, tuple(s.dynamic(n) for n in names), names, ["hidden_out", "cache_out"])


def trace_head(s: Shapes) -> ir.Model:
    module = on_meta(lambda: deepseek_v2.Head(s.config), s.dtype)
    arguments = (s.rows(s.config.hidden_size, s.dtype), s.batch_input("logit_rows"))
    names = ["hidden", "logit_rows"]
    return trace(module, arguments, tuple(s.dynamic(n) for n in names), names, [LOGITS, LAST_HIDDEN])


def on_meta(make: Callable[[], torch.nn.Module], dtype: torch.dtype) -> torch.nn.Module:
    """A module without memory: parameters in `dtype`, buffers in their own."""
    with torch.device("meta"):
        module = make().eval()
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(False)
    return module


def trace(module, arguments, dynamic, input_names, output_names) -> ir.Model:
    """Traces a module on the meta device; its parameters and buffers come out as graph inputs under their own names."""
    table = {getattr(torch.ops.latentrt, op.CONTRACT.name).default: onnx_translation(op.CONTRACT) for op in CUSTOM_OPS}
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
