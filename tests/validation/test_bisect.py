"""Bisection: a right engine passes in every format; what was broken on purpose is found at its tensor, by its name.

The twelve are those of `defects`; more are injected here.
"""

import gc
import json
import weakref
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from latentrt import cli
from latentrt.export.checkpoint import Checkpoint
from latentrt.plugins import cache_formats
from latentrt.plugins.cache_formats import fp8 as fp8_cache
from latentrt.plugins.mla_attention import reference as attention_op
from latentrt.runtime.backends.torch import fused_ops
from latentrt.runtime.bundle.reader import Bundle
from latentrt.validation import tokens
from latentrt.validation.bisect import bisect, runners
from latentrt.validation.bisect.bisect import Bisect, Bisection
from latentrt.validation.bisect.diagnosis import Defect
from latentrt.validation.judge import metrics
from latentrt.validation.reference import formulas
from latentrt.validation.reference.arithmetic import Exact
from latentrt.validation.reference.layer import Layer, Rows
from latentrt.validation.reference.model import Reference
from latentrt.validation.stages.executor import Executor
from tests import checkpoints
from tests.conftest import EXAMPLE, TINY
from tests.validation import defects
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


CPU = [
    ("fp32", "exact", "float32"), ("fp32", "exact", "int6"), ("int8", "exact", "float16"), ("int8", "fast", "float32"),
    ("int8", "fast", "fp8"), ("int4", "exact", "int6r"), ("int4", "fast", "int4"), ("int4", "fast", "float32"),
]  # fmt: skip


@pytest.mark.parametrize(("precision", "accuracy", "cache_format"), CPU)
def test_a_right_engine_passes_twice(traced, tiny_checkpoint, tmp_path, precision, accuracy, cache_format):
    """Own kernels where a graph has them ("fast"), ONNX Runtime's products elsewhere."""
    name = f"tiny.{precision}.{accuracy}.{cache_format}"
    options = {"precision": precision, "accuracy": accuracy, "cache_format": cache_format}
    path = traced.build_once(name, tiny_checkpoint, tmp_path / "bundle", "cpu", **options)
    passes_twice(path, tiny_checkpoint)


@pytest.mark.parametrize("target", ["sm86", "sm89"])
def test_a_right_graph_for_a_gpu_passes_twice(gpu_bundle, target):
    """bf16 and FP8, interpreted by PyTorch."""
    passes_twice(gpu_bundle, EXAMPLE, target)


@pytest.mark.parametrize("cache_format", ["bfloat16", "fp8", "int6", "int6r", "int4"])
def test_a_right_cache_in_bf16_passes_twice(traced, tiny_checkpoint, tmp_path, cache_format):
    options = {"precision": "bf16", "cache_format": cache_format}
    path = traced.build_once(f"tiny.torch.{cache_format}", tiny_checkpoint, tmp_path / "bundle", "torch", **options)
    passes_twice(path, tiny_checkpoint)


@pytest.mark.parametrize("precision", ["bf16-int4", "fp8-int4"])
def test_right_experts_of_4_bits_pass_twice(traced, stand_ins, tmp_path, precision):
    with stand_ins():
        path = traced.build_once(f"example.gpu.{precision}", EXAMPLE, tmp_path / "bundle", "sm89", precision=precision)
    passes_twice(path, EXAMPLE)


def test_what_two_ranks_share_passes_twice(traced, tiny_checkpoint, tmp_path):
    """In one process."""
    path = traced.build_once("tiny.ranks", tiny_checkpoint, tmp_path / "bundle", "torch", precision="fp32", ranks=2)
    passes_twice(path, tiny_checkpoint)


def passes_twice(path: Path, checkpoint: Path, target: str | None = None) -> None:
    """The same verdict and errors both times; where formats round, the emulation has the found error to a tenth.

    A tenth: own kernels and torch round some values between ops that the emulation keeps, measured 3 % at most.
    """
    found, again = (bisected(path, checkpoint, target) for _ in range(2))
    assert found.passed, found.defects[0]
    assert (found.verdict, found.flips) == (again.verdict, again.flips)
    assert [k.spread.found for k in found.looked] == [k.spread.found for k in again.looked]
    layers = Bundle(path).manifest.config["num_hidden_layers"]
    assert {k.part for k in found.looked} == {"embed", "head", *(f"model.layers.{i}" for i in range(layers))}
    for k in (k for k in found.looked if k.spread.expected.whole > 1e-4):
        assert k.spread.found.whole == pytest.approx(k.spread.expected.whole, rel=0.1), k


def first(found: Bisection) -> Defect:
    assert found.verdict == "defect", [(k.part, k.tensor, k.spread.ratio) for k in found.looked][-3:]
    return found.defects[0]


def holds(defect: Defect, place: str, kind: str, words: str = "") -> None:
    found = defect.place, defect.hypothesis.kind, defect.hypothesis.words
    assert (defect.place, defect.hypothesis.kind) == (place, kind) and words in defect.hypothesis.words, found


# -- the twelve ----------------------------------------------------------------------------------------------------------


def test_wrong_mscale(copied, tiny_checkpoint, monkeypatch):
    defects.wrong_mscale(copied, monkeypatch)
    found = bisected(copied, tiny_checkpoint)
    holds(first(found), "model.layers.0.self_attn", "wrong scale factor", "YaRN's mscale^2 dropped")
    assert [d.part for d in found.defects] == [f"model.layers.{i}" for i in range(3)]
    assert found.defects[0].tensor == "attended" and found.defects[0].value == "model.layers.0.mla_attention.attended"


def test_half_split_rope(torch_copy, tiny_checkpoint, monkeypatch):
    defects.half_split_rope(torch_copy, monkeypatch)
    defect = first(bisected(torch_copy, tiny_checkpoint))
    holds(defect, "model.layers.0.self_attn.rotary_emb", "half-split RoPE")
    assert defect.tensor == "k_pe"


def test_causal_mask_off_by_one(copied, tiny_checkpoint, monkeypatch):
    defects.causal_mask_off_by_one(copied, monkeypatch)
    holds(first(bisected(copied, tiny_checkpoint)), "model.layers.0.self_attn", "causal mask off by 1", "does not see itself")


def test_two_pages_swapped(torch_copy, tiny_checkpoint, monkeypatch):
    defects.two_pages_swapped(torch_copy, monkeypatch)
    defect = first(bisected(torch_copy, tiny_checkpoint))
    holds(defect, "model.layers.0.self_attn", "pages swapped", "are swapped, as sequence 3 reads it, in decode steps only")
    assert defect.tensor == "attended"


def test_experts_permuted(copied, tiny_checkpoint, monkeypatch):
    defects.experts_permuted(copied, monkeypatch)
    defect = first(bisected(copied, tiny_checkpoint))
    kind = "experts permuted (permutation)"
    holds(defect, "model.layers.1.mlp.experts.2.gate_proj.weight", kind, "2 of 8 experts are others: 2 holds 5, 5 holds 2")
    assert defect.module == "model.layers.1.mlp.experts" and defect.tensor == "experts"


def test_group_limit_ignored(torch_copy, tiny_checkpoint, monkeypatch):
    defects.group_limit_ignored(torch_copy, monkeypatch)
    found = bisected(torch_copy, tiny_checkpoint)
    holds(first(found), "model.layers.2.mlp.gate", "group limit (ignored)")
    assert any(not f.explained and f.layer == 2 and f.score_margin > 0 for f in found.flips)


def test_routed_scaling_factor_dropped(torch_copy, tiny_checkpoint, monkeypatch):
    defects.routed_scaling_factor_dropped(torch_copy, monkeypatch)
    defect = first(bisected(torch_copy, tiny_checkpoint))
    words = "found / expected = 0.5882 (routed_scaling_factor dropped)"
    holds(defect, "model.layers.1.mlp.gate", "wrong scale factor", words)
    assert defect.tensor == "topk_weights"


def test_a_transposed_scale(gpu_copy, monkeypatch):
    defects.transposed_scale(gpu_copy, monkeypatch)
    defect = first(bisected(gpu_copy, EXAMPLE, "sm89"))
    place = "model.layers.3.mlp.experts.0.down_proj.weight"
    holds(defect, place, "transposed scale", "[16, 192] of experts or heads and outputs")


def test_a_stale_page(torch_copy, tiny_checkpoint, monkeypatch):
    defects.stale_page(torch_copy, monkeypatch)
    defect = first(bisected(torch_copy, tiny_checkpoint))
    holds(defect, "model.layers.0.self_attn", "stale page", "still holds the tokens of an earlier sequence")
    assert defect.tensor == "cached latent" and defect.value == "latent_cache.0"


def test_a_stuck_weight(copied, tiny_checkpoint, monkeypatch):
    defects.stuck_weight(copied, monkeypatch)
    holds(first(bisected(copied, tiny_checkpoint)), defects.STUCK, "weight stuck", "holds the values of layer 1")


def test_fp8_saturation(gpu_copy, monkeypatch):
    defects.fp8_saturation(gpu_copy, monkeypatch)
    defect = first(bisected(gpu_copy, EXAMPLE, "sm89"))
    holds(defect, "model.layers.0.self_attn.q_a_proj", "saturated values", "cut off at 0.25")


def test_softmax_in_half_precision(torch_copy, tiny_checkpoint, monkeypatch):
    defects.softmax_in_half(torch_copy, monkeypatch)
    defect = first(bisected(torch_copy, tiny_checkpoint))
    holds(defect, "model.layers.0.self_attn", "softmax in half precision", "float16")


# -- more of each kind ---------------------------------------------------------------------------------------------------


def test_positions_off_by_one(copied, tiny_checkpoint):
    """All angles come from the embedding, so no layer is wrong: each gets the right ones."""

    def change(model):
        cast = next(n for n in model.graph.node if n.op_type == "Cast" and n.input[0] == "positions")
        cast.input[0] = "later"
        model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int32), "one"))
        model.graph.node.insert(0, onnx.helper.make_node("Add", ["positions", "one"], ["later"], name="later"))

    edit_graph(copied, change)
    found = bisected(copied, tiny_checkpoint)
    holds(first(found), "model.rotary_emb", "positions off", "position +1")
    assert [d.part for d in found.defects] == ["embed"]


def test_pages_written_for_each_other(torch_copy, tiny_checkpoint, monkeypatch):
    real = attention_op.appended

    def appended(latent, k_pe, cache, block_table, *batch):
        table = block_table.clone()
        table[:2, 0] = block_table[:2, 0].flip(0)
        yield from real(latent, k_pe, cache, table, *batch)

    monkeypatch.setattr(attention_op, "appended", appended)
    defect = first(bisected(torch_copy, tiny_checkpoint))
    holds(defect, "model.layers.0.self_attn", "pages swapped", "holds the tokens of page")
    assert defect.tensor == "cached latent"


def test_a_term_is_missing(torch_copy, tiny_checkpoint):
    """The shared experts' output is added nowhere."""

    def change(model):
        (added,) = [n for n in model.graph.node if "model.layers.1.mlp.output" in n.output]
        added.op_type = "Identity"
        del added.input[1:]

    edit_graph(torch_copy, change)
    holds(first(bisected(torch_copy, tiny_checkpoint)), "model.layers.1.mlp", "missing term", "the shared experts left out")


def test_heads_and_channels_transposed(torch_copy, tiny_checkpoint):
    """What w_uv makes is laid out channel by channel before o_proj."""

    def change(model):
        gemm = next(n for n in model.graph.node if "model.layers.1.self_attn.o_proj.weight" in n.input)
        turned = next(n for n in model.graph.node if gemm.input[0] in n.output)  # Reshape of [T, H, v_head_dim]
        place = list(model.graph.node).index(turned)
        swap = onnx.helper.make_node("Transpose", [turned.input[0]], ["swapped"], name="swap", perm=[0, 2, 1])
        turned.input[0] = "swapped"
        model.graph.node.insert(place, swap)

    edit_graph(torch_copy, change)
    defect = first(bisected(torch_copy, tiny_checkpoint))
    holds(defect, "model.layers.1.self_attn.kv_b_proj", "transposition", "4 heads and their channels")


def test_a_saturated_cache(traced, stand_ins, tmp_path, monkeypatch):
    """e4m3 with scales a quarter of what they should be; engines and references are told apart by what they import."""
    with stand_ins():
        path = traced.build_once("example.gpu.fp8cache", EXAMPLE, tmp_path / "bundle", "sm86", cache_format="fp8")
    right = cache_formats.get("fp8")
    narrow = type("Narrow", (fp8_cache.Fp8,), {"encode": lambda self, latent, k_pe: _cut(right, latent, k_pe)})()
    real = attention_op.appended

    def appended(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(attention_op.cache_formats, "get", lambda name: narrow)
            yield from real(*arguments)

    monkeypatch.setattr(attention_op, "appended", appended)
    defect = first(bisected(path, EXAMPLE))
    holds(defect, "model.layers.0.self_attn", "saturated values")
    assert defect.tensor == "cached latent"


def _cut(layout, latent, k_pe):
    most = latent.float().abs().amax(-1, keepdim=True) / 4
    return layout.encode(latent.float().clamp(-most, most), k_pe)


def test_a_stuck_expert_and_a_constant(copied, tiny_checkpoint):
    def repeat(values):
        stacked = values.reshape(8, -1).copy()
        stacked[6] = stacked[1]
        return stacked.ravel()

    edit_weight(copied, "model.layers.1.mlp.experts.down_proj", repeat)
    edit_weight(copied, "model.layers.2.self_attn.q_b_proj.weight", lambda values: np.full_like(values, 0.5))
    one, other = bisected(copied, tiny_checkpoint).defects
    holds(one, "model.layers.1.mlp.experts.6.down_proj.weight", "weight stuck", "6 holds 1")
    holds(other, "model.layers.2.self_attn.q_b_proj.weight", "weight stuck", "all its values are 0.5")


def test_what_nothing_explains_is_still_a_defect(torch_copy, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(fused_ops, "rotate", lambda x, cos, sin: torch.ones_like(x))
    defect = first(bisected(torch_copy, tiny_checkpoint))
    holds(defect, "model.layers.0.self_attn.rotary_emb", "unknown", "no hypothesis fits")


# -- the reference, memory, the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"q_lora_rank": None, "topk_method": "greedy", "attention_bias": True}])
def test_the_formulas_are_transformers_layers(tmp_path, fields):
    """Tensor by tensor, on the input that each layer has there; 2e-6 is float32's rounding over a layer's sums, doubled."""
    checkpoint = Checkpoint(checkpoints.write(tmp_path / "checkpoint", **fields))
    window = np.random.default_rng(0).integers(0, checkpoints.CONFIG["vocab_size"], 40)
    trace, c = Reference(checkpoint).trace(window), checkpoint.config
    angles = torch.arange(40)[:, None] * torch.from_numpy(formulas.inverse_frequencies(c))
    cos, sin = angles.cos() * formulas.rotation_factor(c), angles.sin() * formulas.rotation_factor(c)
    weights = {w.name: w for w in checkpoint.weights()}
    hidden = torch.from_numpy(trace.embedding).double()
    for index in range(c.num_hidden_layers):
        layer = Layer(c, index, Exact(weights, checkpoint.read))
        found = layer.run(Rows(hidden, cos, sin, (slice(0, 40),)))
        expected = {"attention": trace.attention, "mlp": trace.mlp, "hidden": trace.hidden}
        for name, theirs in expected.items():
            assert metrics.relative_error(theirs[index], found[name].numpy()) < 2e-6, (index, name)
        if routing := trace.routing.get(index):
            assert metrics.relative_error(routing.router_logits, found["router_logits"].numpy()) < 2e-6
            assert np.array_equal(np.sort(routing.ids, -1), found["topk_ids"].sort(-1).values.numpy())
        hidden = torch.from_numpy(trace.hidden[index]).double()


def test_weights_of_one_layer_alone_are_in_memory(tiny_bundle, tiny_checkpoint, torch_bundle, monkeypatch):
    """Of the engine: a part's graph names weights of its own, and the part before is gone when the next is opened. Of the
    checkpoint: never two tensors of different layers at a time, and of one a few only."""
    alive, most = weakref.WeakSet(), [0]
    names = {}
    read, opened = Checkpoint.read, []

    def noted(self, name):
        tensor = read(self, name)
        alive.add(tensor)
        names[id(tensor)] = name
        layers = {names[id(t)].split(".")[2] for t in list(alive) if names[id(t)].startswith("model.layers")}
        assert len(layers) <= 1, layers
        most[0] = max(most[0], len(list(alive)))
        return tensor

    def open_(real):
        def opening(self, part):
            gc.collect()
            assert not [call for call in opened if call() is not None], part.name
            strangers = [w for w in part.weights if part.name.startswith("model") and not w.startswith(f"{part.name}.")]
            assert not strangers and part.weights, strangers
            call = real(self, part)
            opened.append(weakref.ref(call))
            return call

        return opening

    monkeypatch.setattr(Checkpoint, "read", noted)
    for kind in (runners.OnnxRuntimeRunner, runners.TorchRunner):
        monkeypatch.setattr(kind, "open", open_(kind.open))
    for path in (tiny_bundle, torch_bundle):
        assert bisected(path, tiny_checkpoint).passed
    assert len(opened) == 2 * 5 and most[0] <= 3


def test_the_command(copied, tiny_checkpoint, tmp_path, capsys):
    """Exit status, table, evidence in the bundle, report; a defect is told by both names."""
    arguments = ["validate", str(copied), "--reference", str(tiny_checkpoint), "--bisect", "--report", str(tmp_path / "report")]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "PASS: rounding" in shown and "kv_a_proj_with_mqa" in shown and " steps over 8 pages" in shown
    evidence = json.loads((tmp_path / "report" / "bisection.json").read_text())
    assert evidence["verdict"] == "rounding" and evidence["first_defect"] is None and evidence["peak_bytes"] > 1e6
    bundle = Bundle(copied)
    assert json.loads(bundle.evidence_file("cpu.bisect").read_text()) == evidence
    assert bundle.evidence_file("cpu.bisect") in bundle.evidence_files("cpu")  # a shared bundle may hold others' as well
    edit_weight(copied, "model.layers.1.self_attn.kv_b_proj.w_uv", lambda values: 1.02 * values)
    assert cli.main([*arguments, "--json"]) == 1
    evidence = json.loads(capsys.readouterr().out)
    place = "model.layers.1.self_attn.kv_b_proj.weight (model.layers.1._unsafe_view)"
    assert evidence["first_defect"] == f"{place}: wrong scale factor: of the weight: found / expected = 1.02"
    assert cli.main(arguments) == 1
    assert "DEFECT, first at  model.layers.1.self_attn.kv_b_proj.weight" in capsys.readouterr().out


def test_a_reference_that_does_not_fit(tiny_bundle, tmp_path, capsys):
    other = checkpoints.write(tmp_path / "other", seed=1, **TINY)
    cases = (other, "is another checkpoint (sha256 "), (EXAMPLE, "vocab_size is 4096, the bundle's model has")
    for reference, words in cases:
        assert cli.main(["validate", str(tiny_bundle), "--reference", str(reference), "--bisect", "--json"]) == 2
        error = json.loads(capsys.readouterr().out)["error"]
        assert words in error and "give the" in error

