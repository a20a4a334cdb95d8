"""The whole comparison on tiny bundles: a pass where all is well, and the first bad stage and layer where it is not."""

import json
import re
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from latentrt import cli
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.lowering.onnxruntime.choices import CACHE_FORMATS as CPU_CACHES
from latentrt.plugins.step_graph import DECODE_FORM, mlp_output
from latentrt.runtime import backends
from latentrt.runtime.backends.base import SequenceRows, pack
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.errors import BundleError
from latentrt.validation.dequantize import bundle_config, dequantized_state_dict
from latentrt.validation.errors import ValidationError
from latentrt.validation.judge import tolerances
from latentrt.validation.judge.tolerances import Tolerance
from latentrt.validation.report import page
from latentrt.validation.stages.base import Force
from latentrt.validation.stages.debug_graph import OnnxRuntimeGraph
from latentrt.validation.stages.model import ModelStage
from latentrt.validation.validate import validate
from tests import checkpoints
from tests.conftest import EXAMPLE
from tests.validation.conftest import FEW_TOKENS, TOKENS, edit_graph, edit_weight

pytestmark = pytest.mark.slow


def run(capsys, *, bundle, reference, **options) -> tuple[int, dict]:
    """The command in this process: exit status and what --json prints."""
    options = {"reference": reference, "tokens": FEW_TOKENS} | options
    status = cli.main(["validate", str(bundle), "--json", *(f"--{name}={value}" for name, value in options.items())])
    return status, json.loads(capsys.readouterr().out)


def test_fp32_passes_every_check(validated):
    evidence, comparison = validated
    assert evidence["verdict"] == "pass", evidence["first_failure"]
    stages = {c.stage for c in comparison.findings.checks}
    assert stages == {"bundle", "weights", "torch model", "exported graph", "engine"}
    for stage in ("torch model", "exported graph", "engine"):
        assert set(evidence["logits"][stage]) == {"prefill", "chunked", "decode"}
        assert len(evidence["layers"][stage]) == 3
        assert [r["layer"] for r in evidence["routing"][stage]] == [1, 2]
    assert evidence["logits"]["engine"]["decode"]["max_abs_error"] < 1e-4
    assert evidence["perplexity"]["ratio"] == pytest.approx(1, abs=1e-5)
    assert "pseudo-random" in evidence["text"]["source"] and not evidence["text"]["is_text"]


def test_report_is_one_self_contained_page(validated, tmp_path):
    evidence, comparison = validated
    text = page.write_report(tmp_path / "report", evidence, comparison.findings).read_text()
    assert json.loads((tmp_path / "report" / page.JSON_NAME).read_text()) == evidence
    assert text.count("data:image/png;base64,") == 4
    assert not re.search(r'(src|href)="(?!data:)|https?://|@import', text)
    for check in comparison.findings.checks:
        assert check.name.replace("'", "&#39;") in text
    assert evidence["bundle"]["manifest_sha256"] in text
    assert [p.name for p in (tmp_path / "report").iterdir() if p.name.startswith(".")] == []


def test_text_option_and_evidence(tiny_bundle, tiny_checkpoint, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("def main():\n    return 1\n" * 40)
    status, evidence = run(capsys, bundle=tiny_bundle, reference=tiny_checkpoint, text=text, report=tmp_path / "r")
    assert status == 0, evidence["first_failure"]
    assert str(text) in evidence["text"]["source"] and evidence["text"]["tokens"] == FEW_TOKENS
    bundle = Bundle(tiny_bundle)
    assert json.loads(bundle.evidence_file("cpu").read_text()) == evidence
    assert evidence["bundle"]["manifest_sha256"] == bundle.digest
    assert evidence["checkpoint"]["sha256"] == bundle.manifest.checkpoint.digest


def test_a_perturbed_weight_is_found_by_name_and_layer(copied, tiny_checkpoint, capsys):
    name = "model.layers.1.mlp.shared_experts.down_proj.weight"
    edit_weight(copied, name, lambda w: w * 1.05)
    status, evidence = run(capsys, bundle=copied, reference=tiny_checkpoint)
    assert status == 1
    assert evidence["first_failure"].startswith("weights:") and name in evidence["first_failure"]
    failed = {(c["stage"], c["name"]): c["detail"] for c in evidence["checks"] if not c["passed"]}
    assert "layer 1 is the first that is off: its MoE block" in failed["engine", "each layer alone: largest relative error"]
    assert not any(stage in ("torch model", "exported graph", "bundle") for stage, _ in failed)


def test_a_wrong_softmax_scale_in_the_graph_is_found(copied, tiny_checkpoint, capsys):
    def change(model):
        node = [n for n in model.graph.node if n.op_type == "MlaAttention"][2]
        next(a for a in node.attribute if a.name == "softmax_scale").f *= 0.8

    edit_graph(copied, change)
    status, evidence = run(capsys, bundle=copied, reference=tiny_checkpoint)
    assert status == 1
    failed = {(c["stage"], c["name"]): c["detail"] for c in evidence["checks"] if not c["passed"]}
    assert {stage for stage, _ in failed} == {"engine"}
    assert "layer 2 is the first that is off: its attention" in failed["engine", "each layer alone: largest relative error"]


def test_a_wrong_router_is_found(copied, tiny_checkpoint, capsys):
    def change(model):
        function = next(f for f in model.functions if f.name == "MoeRoute")
        top = [n for n in function.node if n.op_type == "TopK"][-1]
        top.attribute.append(onnx.helper.make_attribute("largest", 0))

    edit_graph(copied, change)
    status, evidence = run(capsys, bundle=copied, reference=tiny_checkpoint)
    failed = {(c["stage"], c["name"]): c["detail"] for c in evidence["checks"] if not c["passed"]}
    assert status == 1
    assert "layer 1" in failed["engine", "routing flips without a near tie"]
    assert ("engine", "each layer alone: largest relative error") not in failed  # with the routing given, all is well


def test_forced_routing_is_taken_and_forgotten(tiny_checkpoint):
    """By the torch model: other experts, other answers; then its own routing again."""
    stage, tokens = ModelStage(Checkpoint(tiny_checkpoint), 8), np.arange(9)
    free = stage.trace(tokens)
    other = {layer: replace(r, ids=(r.ids + 1) % 8) for layer, r in free.routing.items()}
    forced, again = stage.trace(tokens, Force(other)), stage.trace(tokens)
    assert all(np.array_equal(forced.routing[layer].ids, other[layer].ids) for layer in (1, 2))
    assert np.abs(forced.logits - free.logits).max() > 0.1
    np.testing.assert_array_equal(again.logits, free.logits)
    for trace in (free, forced):
        assert [len(v) for v in (trace.hidden, trace.attention, trace.mlp)] == [3, 3, 3]
        np.testing.assert_allclose(trace.hidden[1], trace.hidden[0] + trace.attention[1] + trace.mlp[1], atol=1e-5)


def test_a_file_with_another_content_fails(copied, tiny_checkpoint, capsys):
    file = next((copied / "files").glob("*.json"))
    file.write_bytes(file.read_bytes()[:-1] + b" ")
    status, evidence = run(capsys, bundle=copied, reference=tiny_checkpoint)
    assert status == 1 and evidence["first_failure"].startswith("bundle: files with a wrong digest")


def test_int8_exact_equals_transformers_with_decoded_weights(int8_pair):
    evidence, comparison = validate(*int8_pair, count=TOKENS)
    assert evidence["tolerances"] == "int8, exact"
    checks = {(c.stage, c.name): c for c in comparison.findings.checks}
    for (stage, name), check in checks.items():
        if "original" not in name:  # what 8 bits cost a random model is no concern here
            assert check.passed, (stage, name, check)
    assert max(m["judged_max_abs_error"] for m in evidence["logits"]["engine"].values()) < 1e-3


@pytest.mark.deep
def test_int4_of_the_example_passes(traced, tmp_path):
    """The promise for 4 bits on a trained model: mean KL of 0.05 nats, the same first choice for 90 % of tokens."""
    bundle = traced.build_once("example.int4", EXAMPLE, tmp_path / "bundle", "cpu", "int4")
    evidence, comparison = validate(bundle, EXAMPLE, count=1024)
    assert evidence["tolerances"] == "int4, fast"
    failed = [c for c in comparison.findings.checks if not c.passed]
    assert not failed and comparison.findings.fidelity["kl_mean"] < 0.05, failed


def test_dequantized_checkpoint_loads_in_transformers(int8_pair, tmp_path, capsys):
    bundle, checkpoint = int8_pair
    assert cli.main(["dequantize", str(bundle), f"--reference={checkpoint}", f"--out={tmp_path / 'out'}"]) == 0
    state = dequantized_state_dict(Bundle(bundle))
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: {len(state)} tensors, float32\n"
    assert all(t.dtype == torch.float32 for t in state.values())
    tokens = np.random.default_rng(1).integers(0, 101, 40)
    with backends.load(Bundle(bundle), cache_tokens=64) as engine:
        found = engine.step(pack([SequenceRows(tokens.tolist(), 0, range(40))], np.array([[1]]))).logits()
    expected = checkpoints.reference_logits(checkpoints.reference(tmp_path / "out"), tokens.tolist())
    assert np.abs(found - expected.numpy()).max() < 1e-3


def test_user_errors(tiny_bundle, tiny_checkpoint, int8_pair, tmp_path, capsys):
    cases = [
        (dict(bundle=tmp_path / "none", reference=tiny_checkpoint), "not a bundle"),
        (dict(bundle=tiny_bundle, reference=tmp_path / "none"), "not a folder"),
        (dict(bundle=tiny_bundle, reference=int8_pair[1]), "the bundle's model has"),
        (dict(bundle=tiny_bundle, reference=tiny_checkpoint, target="sm89"), "no target 'sm89'"),
        (dict(bundle=tiny_bundle, reference=tiny_checkpoint, text=tmp_path / "none.txt"), "none.txt"),
        (dict(bundle=int8_pair[0], reference=int8_pair[1], text=tiny_checkpoint / "config.json"), "has no tokenizer"),
        (dict(bundle=tiny_bundle, reference=tiny_checkpoint, tokens=3), "--tokens"),
    ]
    for arguments, message in cases:
        status, output = run(capsys, **arguments)
        assert status == 2 and message in output["error"], output
        assert "\n" not in output["error"].strip()


def test_a_value_that_the_graph_lacks_is_named(tiny_bundle):
    target = Bundle(tiny_bundle).target(None)[1]
    model = onnx.load(Bundle(tiny_bundle).file(target.engines[DECODE_FORM].graph), load_external_data=False)
    for node in model.graph.node:
        node.output[:] = ["renamed" if name == mlp_output(1) else name for name in node.output]
    with pytest.raises(ValidationError, match=r"no value model\.layers\.1\.mlp\.output, .* build the bundle again"):
        OnnxRuntimeGraph(model, tiny_bundle, target.cache.page_size, target.cache.width, target.cache.dtype, 1)


def test_a_family_that_is_not_known_is_refused(copied):
    file = copied / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"family": "deepseek_v9"}))
    with pytest.raises(BundleError, match=f"^{re.escape(str(copied))}: .*'deepseek_v9', accepted: 'deepseek_v2'"):
        bundle_config(Bundle(copied))


def test_a_report_that_cannot_be_written_is_refused_at_the_start(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    nothing = dict(bundle=tmp_path / "none", reference=tmp_path / "none")
    for folder in ("file", "file/x", "file/x/y"):
        status, output = run(capsys, report=tmp_path / folder, **nothing)
        assert status == 2 and output["error"].endswith(f"{tmp_path / 'file'} is a file; give a folder for the report")
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    status, output = run(capsys, report=tmp_path / "new" / "x", **nothing)
    assert status == 2 and f"{tmp_path} is not writable" in output["error"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_limit_never_passes_nan():
    assert not Tolerance(1.0, "").passes(float("nan"))
    assert not Tolerance(1.0, "", ">=").passes(float("nan"))


def test_every_tolerance_has_a_reason():
    rows = ("fp32", "exact"), *((precision, a) for precision in ("int8", "int4") for a in ("exact", "fast"))
    cpu = [(*row, cache) for row in rows for cache in CPU_CACHES]
    for row in (*cpu, *((p, "", "bfloat16") for p in ("bf16", "fp8", "fp8-int4", "bf16-int4"))):
        found = tolerances.find(*row)
        assert all(t.reason for t in vars(found).values() if isinstance(t, Tolerance))
    with pytest.raises(KeyError, match="known: fp32"):
        tolerances.find("fp4", "exact", "float32")
    with pytest.raises(KeyError, match=r"known: .*bfloat16"):
        tolerances.find("fp8", "", "int5")


@pytest.mark.deep
@pytest.mark.parametrize(("precision", "name"), [("int8", "int8, fast, int6 cache"), ("fp32", "fp32, int6 cache")])
def test_a_packed_cache_of_the_example_passes(traced, tmp_path, precision, name):
    """int6: what is allocated is what the formula says, and layer by layer the engine keeps to its limits.

    By own kernels at int8, fast, where there is a compiler; by plain ONNX Runtime in fp32.
    """
    path = traced.build_once(f"example.{precision}.int6", EXAMPLE, tmp_path / "bundle", "cpu", precision, cache_format="int6")
    evidence, comparison = validate(path, EXAMPLE, count=1024)
    assert evidence["tolerances"] == name
    failed = [c for c in comparison.findings.checks if not c.passed]
    assert not failed and comparison.findings.fidelity["kl_mean"] < 2e-3, failed
    bundle = Bundle(path)
    config, cache = bundle.manifest.config, bundle.target(None)[1].cache
    rank, rope, layers = (config[name] for name in ("kv_lora_rank", "qk_rope_head_dim", "num_hidden_layers"))
    assert cache.bytes_per_token == layers * (rank * 6 // 8 + rope + 4)  # 6 and 8 bits, two float16 scales
    with backends.load(bundle, cache_tokens=640) as engine:
        pages, size = engine.num_pages, engine.target.cache.page_size
        assert sum(c.nbytes for c in engine.caches) == pages * size * cache.bytes_per_token
