"""Bisection: a right engine passes in every format; what was broken on purpose is found at its tensor, by its name.

Defects go into the engine's graph, weights or kernels; the reference reads the checkpoint and knows none of them.
"""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors import safe_open

from latentrt.export.checkpoint import Checkpoint
from latentrt.plugins.mla_attention import reference as attention_op
from latentrt.runtime.backends.torch import fused_ops
from latentrt.runtime.bundle.reader import Bundle
from latentrt.validation import tokens
from latentrt.validation.bisect import bisect
from latentrt.validation.bisect.bisect import Bisect, Bisection
from latentrt.validation.bisect.diagnosis import Defect
from latentrt.validation.stages.executor import Executor
from tests.conftest import EXAMPLE
from tests.validation.conftest import edit_graph, edit_weight

pytestmark = pytest.mark.slow


def bisected(bundle: Path, checkpoint: Path, target: str | None = None) -> Bisection:
    """Without the audit of the reference, which has tests of its own."""
    opened, source = Bundle(bundle), Checkpoint(checkpoint)
    name, entry = opened.target(target)
    on_torch = entry.backend != "onnxruntime"
    executor = Executor(opened, name, entry, *(("torch", "cpu") if on_torch else ()))
    chosen = tokens.load(source, None, 480, entry.limits.max_context)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bisect, "audit", lambda config, raw: [])
        return Bisect(executor, source, chosen).run()


@pytest.fixture(scope="module")
def torch_bundle(traced, tiny_checkpoint, tmp_path_factory) -> Path:
    """The tiny checkpoint in fp32 for target torch, whose kernels are plain functions that a test can replace."""
    return traced.build_once("tiny.torch", tiny_checkpoint, tmp_path_factory.mktemp("torch") / "bundle", "torch", "fp32")


@pytest.fixture
def torch_copy(torch_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(torch_bundle, tmp_path / "torch"))


@pytest.fixture
def gpu_copy(gpu_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(gpu_bundle, tmp_path / "gpu"))


def first(found: Bisection) -> Defect:
    assert found.verdict == "defect", [(k.part, k.tensor, k.spread.ratio) for k in found.looked][-3:]
    return found.defects[0]


def holds(defect: Defect, place: str, kind: str, words: str = "") -> None:
    found = defect.place, defect.hypothesis.kind, defect.hypothesis.words
    assert (defect.place, defect.hypothesis.kind) == (place, kind) and words in defect.hypothesis.words, found


def of_type(model: onnx.ModelProto, *kinds: str) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if n.op_type in kinds]


def set_attribute(node: onnx.NodeProto, name: str, value) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])


# -- the twelve ----------------------------------------------------------------------------------------------------------


def test_wrong_mscale(copied, tiny_checkpoint):
    def change(model):
        for node in of_type(model, "MlaAttention"):
            set_attribute(node, "softmax_scale", 20**-0.5)  # qk_head_dim is 12 + 8

    edit_graph(copied, change)
    found = bisected(copied, tiny_checkpoint)
    holds(first(found), "model.layers.0.self_attn", "wrong scale factor", "YaRN's mscale^2 dropped")
    assert [d.part for d in found.defects] == [f"model.layers.{i}" for i in range(3)]
    assert found.defects[0].tensor == "attended" and found.defects[0].value == "model.layers.0.mla_attention.attended"


def test_half_split_rope(torch_copy, tiny_checkpoint, monkeypatch):
    def rotate(x, cos, sin):
        a, b = x.float().chunk(2, -1)
        cos, sin = (c.reshape(x.shape[0], *[1] * (x.dim() - 2), -1) for c in (cos, sin))
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)

    monkeypatch.setattr(fused_ops, "rotate", rotate)
    defect = first(bisected(torch_copy, tiny_checkpoint))
    holds(defect, "model.layers.0.self_attn.rotary_emb", "half-split RoPE")
    assert defect.tensor == "k_pe"


def test_causal_mask_off_by_one(copied, tiny_checkpoint):
    """In the function that ONNX Runtime inlines: a token does not see itself."""

    def change(model):
        (function,) = [f for f in model.functions if f.name == "MlaAttention"]
        loop = next(n for n in function.node if n.op_type == "Loop")
        (greater,) = [n for n in loop.attribute[0].g.node if n.op_type == "Greater"]
        greater.op_type = "GreaterOrEqual"

    edit_graph(copied, change)
    holds(first(bisected(copied, tiny_checkpoint)), "model.layers.0.self_attn", "causal mask off by 1", "does not see itself")


def test_two_pages_swapped(torch_copy, tiny_checkpoint, monkeypatch):
    """The last two pages of a sequence, the second partly filled, are read in the wrong order by steps that decode."""
    real = attention_op.appended

    def appended(latent, k_pe, cache, block_table, *batch):
        size = cache.shape[1]
        for rows, past, keys, keys_pe in real(latent, k_pe, cache, block_table, *batch):
            if rows.stop - rows.start == 1 and past >= 2 * size:
                position, table = torch.arange(past + 1), block_table[rows.start].long()[[0, 2, 1]]
                cells = cache[table[position // size], position % size]
                keys, keys_pe = cells.split([latent.shape[-1], k_pe.shape[-1]], -1)
            yield rows, past, keys, keys_pe

    monkeypatch.setattr(attention_op, "appended", appended)
    defect = first(bisected(torch_copy, tiny_checkpoint))
    holds(defect, "model.layers.0.self_attn", "pages swapped", "are swapped, as sequence 3 reads it, in decode steps only")
    assert defect.tensor == "attended"


def test_experts_permuted(copied, tiny_checkpoint):
    def swap(values):
        stacked = values.reshape(8, -1).copy()
        stacked[[2, 5]] = stacked[[5, 2]]
        return stacked.ravel()

    for name in ("gate_up_proj", "down_proj"):
        edit_weight(copied, f"model.layers.1.mlp.experts.{name}", swap)
    defect = first(bisected(copied, tiny_checkpoint))
    kind = "experts permuted (permutation)"
    holds(defect, "model.layers.1.mlp.experts.2.gate_proj.weight", kind, "2 of 8 experts are others: 2 holds 5, 5 holds 2")
    assert defect.module == "model.layers.1.mlp.experts" and defect.tensor == "experts"


def test_group_limit_ignored(torch_copy, tiny_checkpoint):
    edit_graph(torch_copy, lambda model: set_attribute(of_type(model, "MoeRoute")[1], "topk_method", "greedy"))
    found = bisected(torch_copy, tiny_checkpoint)
    holds(first(found), "model.layers.2.mlp.gate", "group limit (ignored)")
    assert any(not f.explained and f.layer == 2 and f.score_margin > 0 for f in found.flips)


def test_routed_scaling_factor_dropped(torch_copy, tiny_checkpoint):
    edit_graph(torch_copy, lambda model: set_attribute(of_type(model, "MoeRoute")[0], "routed_scaling_factor", 1.0))
    defect = first(bisected(torch_copy, tiny_checkpoint))
    words = "found / expected = 0.5882 (routed_scaling_factor dropped)"
    holds(defect, "model.layers.1.mlp.gate", "wrong scale factor", words)
    assert defect.tensor == "topk_weights"


def test_a_transposed_scale(gpu_copy):
    """The FP8 experts' scales [16, 192] of down_proj, written as the table [192, 16]."""
    name = "model.layers.3.mlp.experts.down_proj"
    edit_weight(gpu_copy, f"{name}.scale", lambda scale: scale.reshape(16, 192).T.ravel())
    defect = first(bisected(gpu_copy, EXAMPLE, "sm89"))
    holds(defect, "model.layers.3.mlp.experts.0.down_proj.weight", "transposed scale", "[16, 192] of experts or heads and outputs")


def test_a_stale_page(torch_copy, tiny_checkpoint, monkeypatch):
    """What is to go into the second page of a sequence is not written where something lies already."""
    real = attention_op.appended

    def appended(latent, k_pe, cache, block_table, *batch):
        before = cache.clone()
        for found in real(latent, k_pe, cache, block_table, *batch):
            yield found
        for page in block_table[:, 1].tolist():
            if torch.isfinite(before[page]).all():
                cache[page] = before[page]

    monkeypatch.setattr(attention_op, "appended", appended)
    defect = first(bisected(torch_copy, tiny_checkpoint))
    holds(defect, "model.layers.0.self_attn", "stale page", "still holds the tokens of an earlier sequence")
    assert defect.tensor == "cached latent" and defect.value == "latent_cache.0"


def test_a_stuck_weight(copied, tiny_checkpoint):
    name = "model.layers.2.self_attn.o_proj.weight"
    edit_weight(copied, name, lambda values: stored(copied, name.replace(".2.", ".1.")).ravel())
    holds(first(bisected(copied, tiny_checkpoint)), name, "weight stuck", "holds the values of layer 1")


def test_fp8_saturation(gpu_copy):
    """Rows of activations are divided by a quarter of what they should be: beyond 448 they saturate."""

    def change(model):
        (largest,) = [t for t in model.graph.initializer if t.name == "fp8.largest"]
        largest.CopyFrom(numpy_helper.from_array(np.float32(4 * 448), "fp8.largest"))

    edit_graph(gpu_copy, change, "sm89")
    defect = first(bisected(gpu_copy, EXAMPLE, "sm89"))
    holds(defect, "model.layers.0.self_attn.q_a_proj", "saturated values", "cut off at 0.25")


def test_softmax_in_half_precision(torch_copy, tiny_checkpoint, monkeypatch):
    def attend(q_latent, q_pe, keys, keys_pe, past, softmax_scale):
        scores = torch.einsum("nhr,tr->nht", torch.cat([q_latent, q_pe], -1), torch.cat([keys, keys_pe], -1)) * softmax_scale
        future = torch.arange(scores.shape[2])[None, :] > torch.arange(scores.shape[0])[:, None] + past
        weights = scores.half().masked_fill(future[:, None], float("-inf")).softmax(-1).float()
        return torch.einsum("nht,tr->nhr", weights, keys)

    monkeypatch.setattr(attention_op, "_attend", attend)
    defect = first(bisected(torch_copy, tiny_checkpoint))
    holds(defect, "model.layers.0.self_attn", "softmax in half precision", "float16")


def stored(bundle: Path, name: str) -> np.ndarray:
    """A tensor of a bundle's weight sets."""
    for file in (bundle / "files").glob("*.safetensors"):
        with safe_open(file, framework="np") as shard:
            if name in shard.keys():
                return shard.get_tensor(name)
    raise KeyError(name)
