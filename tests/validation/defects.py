"""Twelve defects, injected into an engine's graph, weights or kernels: the reference reads the checkpoint and knows none."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors import safe_open

from latentrt.plugins.mla_attention import reference as attention_op
from latentrt.plugins.mla_prefill import reference as prefill_op
from latentrt.runtime.backends.torch import fused_ops
from tests.validation.conftest import edit_graph, edit_weight

STUCK = "model.layers.2.self_attn.o_proj.weight"
SCALES = "model.layers.3.mlp.experts.down_proj"
Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Injected:
    """A defect of a copied bundle: fixture `copied` (tiny, CPU), `torch_copy` (tiny, target torch) or `gpu_copy` (example)."""

    bundle: str
    inject: Callable[[Path, Patch], None]
    target: str | None = None


def of_type(model: onnx.ModelProto, *kinds: str) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if n.op_type in kinds]


def set_attribute(node: onnx.NodeProto, name: str, value) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])


def stored(bundle: Path, name: str) -> np.ndarray:
    """A tensor of a bundle's weight sets."""
    for file in (bundle / "files").glob("*.safetensors"):
        with safe_open(file, framework="np") as shard:
            if name in list(shard.keys()):
                return shard.get_tensor(name)
    raise KeyError(name)


def wrong_mscale(bundle: Path, patch: Patch) -> None:
    def change(model):
        for node in of_type(model, "MlaAttention"):
            set_attribute(node, "softmax_scale", 20**-0.5)  # qk_head_dim is 12 + 8

    edit_graph(bundle, change)


def half_split_rope(bundle: Path, patch: Patch) -> None:
    def rotate(x, cos, sin):
        a, b = x.float().chunk(2, -1)
        cos, sin = (c.reshape(x.shape[0], *[1] * (x.dim() - 2), -1) for c in (cos, sin))
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)

    patch.setattr(fused_ops, "rotate", rotate)


def causal_mask_off_by_one(bundle: Path, patch: Patch) -> None:
    """In the function that ONNX Runtime inlines: a token does not see itself."""

    def change(model):
        (function,) = [f for f in model.functions if f.name == "MlaAttention"]
        loop = next(n for n in function.node if n.op_type == "Loop")
        (greater,) = [n for n in loop.attribute[0].g.node if n.op_type == "Greater"]
        greater.op_type = "GreaterOrEqual"

    edit_graph(bundle, change)


def two_pages_swapped(bundle: Path, patch: Patch) -> None:
    """The last two pages of a sequence, the second partly filled, are read in the wrong order by steps that decode."""
    real = attention_op.appended

    def appended(latent, k_pe, cache, block_table, *batch):
        size = cache.shape[1]
        for rows, past, keys, keys_pe in real(latent, k_pe, cache, block_table, *batch):
            if rows.stop - rows.start == 1 and past >= 2 * size:
                position, table = torch.arange(past + 1), block_table[rows.start].long().clone()
                last = past // size
                table[[last - 1, last]] = table[[last, last - 1]]
                cells = cache[table[position // size], position % size]
                keys, keys_pe = cells.split([latent.shape[-1], k_pe.shape[-1]], -1)
            yield rows, past, keys, keys_pe

    for module in (attention_op, prefill_op):
        patch.setattr(module, "appended", appended)


def experts_permuted(bundle: Path, patch: Patch) -> None:
    def swap(values):
        stacked = values.reshape(8, -1).copy()
        stacked[[2, 5]] = stacked[[5, 2]]
        return stacked.ravel()

    for name in ("gate_up_proj", "down_proj"):
        edit_weight(bundle, f"model.layers.1.mlp.experts.{name}", swap)


def group_limit_ignored(bundle: Path, patch: Patch) -> None:
    edit_graph(bundle, lambda model: set_attribute(of_type(model, "MoeRoute")[1], "topk_method", "greedy"))


def routed_scaling_factor_dropped(bundle: Path, patch: Patch) -> None:
    edit_graph(bundle, lambda model: set_attribute(of_type(model, "MoeRoute")[0], "routed_scaling_factor", 1.0))


def transposed_scale(bundle: Path, patch: Patch) -> None:
    """The FP8 experts' scales [16, 192] of down_proj, written as the table [192, 16]."""
    edit_weight(bundle, f"{SCALES}.scale", lambda scale: scale.reshape(16, 192).T.ravel())


def stale_page(bundle: Path, patch: Patch) -> None:
    """What is to go into the second page of a sequence is not written where something lies already."""
    real = attention_op.appended

    def appended(latent, k_pe, cache, block_table, *batch):
        before = cache.clone()
        yield from real(latent, k_pe, cache, block_table, *batch)
        for page in block_table[:, 1:2].flatten().tolist():
            if torch.isfinite(before[page]).all():
                cache[page] = before[page]

    for module in (attention_op, prefill_op):
        patch.setattr(module, "appended", appended)


def stuck_weight(bundle: Path, patch: Patch) -> None:
    edit_weight(bundle, STUCK, lambda values: stored(bundle, STUCK.replace(".2.", ".1.")).ravel())


def fp8_saturation(bundle: Path, patch: Patch) -> None:
    """Rows of activations are divided by a quarter of what they should be: beyond 448 they saturate."""

    def change(model):
        (largest,) = [t for t in model.graph.initializer if t.name == "fp8.largest"]
        largest.CopyFrom(numpy_helper.from_array(np.float32(4 * 448), "fp8.largest"))

    edit_graph(bundle, change, "sm89")


def softmax_in_half(bundle: Path, patch: Patch) -> None:
    def attend(q_latent, q_pe, keys, keys_pe, past, softmax_scale):
        scores = torch.einsum("nhr,tr->nht", torch.cat([q_latent, q_pe], -1), torch.cat([keys, keys_pe], -1)) * softmax_scale
        future = torch.arange(scores.shape[2])[None, :] > torch.arange(scores.shape[0])[:, None] + past
        weights = scores.half().masked_fill(future[:, None], float("-inf")).softmax(-1).float()
        return torch.einsum("nht,tr->nhr", weights, keys)

    patch.setattr(attention_op, "_attend", attend)


TWELVE = {
    "wrong mscale": Injected("copied", wrong_mscale),
    "half-split RoPE": Injected("torch_copy", half_split_rope),
    "causal mask off by one": Injected("copied", causal_mask_off_by_one),
    "two pages swapped": Injected("torch_copy", two_pages_swapped),
    "experts permuted": Injected("copied", experts_permuted),
    "group limit ignored": Injected("torch_copy", group_limit_ignored),
    "scaling factor dropped": Injected("torch_copy", routed_scaling_factor_dropped),
    "transposed scale": Injected("gpu_copy", transposed_scale, "sm89"),
    "stale page": Injected("torch_copy", stale_page),
    "stuck weight": Injected("copied", stuck_weight),
    "FP8 saturation": Injected("gpu_copy", fp8_saturation, "sm89"),
    "softmax in half": Injected("torch_copy", softmax_in_half),
}
