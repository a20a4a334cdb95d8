"""A recorded run, judged without its engine: right ones pass, defects fail, and what is stale or another's is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from latentrt import cli
from latentrt.runtime.bundle.reader import Bundle
from latentrt.validation import recording
from latentrt.validation.reference import model
from latentrt.validation.reference.model import Reference
from tests import checkpoints
from tests.conftest import EXAMPLE, TINY
from tests.validation.conftest import edit_weight
from tests.validation.defects import TWELVE

pytestmark = pytest.mark.slow

ON_TORCH = ("--backend", "torch", "--device", "cpu")


@pytest.fixture(autouse=True)
def no_audit(monkeypatch):
    """It has tests of its own."""
    monkeypatch.setattr(model, "audit", lambda config, raw: [])


def record(bundle: Path, file: Path, *options) -> Path:
    assert cli.main(["record", str(bundle), "-o", str(file), "--tokens", "300", "--json", *options]) == 0
    return file


def judged(capsys, subject: Path, file: Path, *options) -> tuple[int, dict]:
    capsys.readouterr()
    status = cli.main(["validate", str(subject), "--recorded", str(file), "--json", *map(str, options)])
    return status, json.loads(capsys.readouterr().out)


def test_a_right_engine_passes_anywhere(tiny_bundle, tiny_checkpoint, tmp_path, capsys):
    """By its bundle, which gets the verdict, and by the checkpoint alone; twice with the same numbers."""
    file = record(tiny_bundle, tmp_path / "run.safetensors")
    status, found = judged(capsys, tiny_bundle, file, "--reference", tiny_checkpoint, "--report", tmp_path / "report")
    assert status == 0, found["first_failure"]
    bundle = Bundle(tiny_bundle)
    assert bundle.evidence_file("cpu.recorded") in bundle.evidence_files("cpu")
    assert json.loads(bundle.evidence_file("cpu.recorded").read_text()) == found
    assert json.loads((tmp_path / "report" / "recorded.json").read_text()) == found
    assert found["bundle"]["manifest_sha256"] == bundle.digest and found["recorded"]["date"] <= found["date"]
    status, again = judged(capsys, tiny_checkpoint, file)
    assert status == 0 and again["checks"] == found["checks"]
    assert cli.main(["validate", str(tiny_checkpoint), "--recorded", str(file)]) == 0
    assert "PASS" in capsys.readouterr().out


@pytest.mark.parametrize(("precision", "cache_format"), [("int8", "int6"), ("int4", "float32")])
def test_formats_that_round_pass(traced, tiny_checkpoint, tmp_path, capsys, precision, cache_format):
    options = {"precision": precision, "cache_format": cache_format}
    path = traced.build_once(f"tiny.rec.{precision}.{cache_format}", tiny_checkpoint, tmp_path / "bundle", "cpu", **options)
    status, found = judged(capsys, tiny_checkpoint, record(path, tmp_path / "run.safetensors"))
    assert status == 0, found["first_failure"]
    layers = next(c for c in found["checks"] if c["name"].startswith("layers"))
    assert layers["value"] == pytest.approx(layers["expected"], rel=0.15) and layers["expected"] > 1e-3


@pytest.mark.parametrize("name", [n for n, d in TWELVE.items() if d.bundle != "gpu_copy"])
def test_a_defect_fails(name, request, tiny_checkpoint, tmp_path, capsys, monkeypatch):
    defect = TWELVE[name]
    bundle = request.getfixturevalue(defect.bundle)
    with monkeypatch.context() as patch:
        defect.inject(bundle, patch)
        file = record(bundle, tmp_path / "run.safetensors", *(ON_TORCH if defect.bundle == "torch_copy" else ()))
    status, found = judged(capsys, tiny_checkpoint, file)
    assert status == 1 and found["verdict"] == "fail", name


def test_sketches_keep_lengths():
    rng = np.random.default_rng(0)
    exact, error = rng.normal(size=(256, 400)), 0.01 * rng.normal(size=(256, 400))
    a, b = recording.sketch(exact, 3), recording.sketch(exact + error, 3)
    assert np.linalg.norm(b - a) == pytest.approx(np.linalg.norm(error), rel=0.05)


def test_what_is_recorded_is_what_the_reference_has(tiny_bundle, tiny_checkpoint, tmp_path):
    """fp32: routing, layers and distributions are transformers', to float32's rounding."""
    from latentrt.export.checkpoint import Checkpoint

    found = recording.read(record(tiny_bundle, tmp_path / "run.safetensors"))
    window = found.tokens.windows[0]
    trace = Reference(Checkpoint(tiny_checkpoint)).trace(window[: found.traced])
    assert [len(rows) for rows in (found.modes[m] for m in ("prefill", "chunked", "decode"))] == [2, 2, 2]
    for layer, (ids, logits) in found.routing.items():
        assert np.array_equal(np.sort(ids), np.sort(trace.routing[layer].ids))
        np.testing.assert_allclose(logits, trace.routing[layer].router_logits, atol=1e-4)
    for layer, sketches in enumerate(found.layers):
        for name in recording.LAYER_VALUES:
            np.testing.assert_allclose(sketches[name], recording.sketch(getattr(trace, name)[layer], layer), atol=1e-3)


def test_stale_and_foreign_recordings_are_refused(copied, tiny_checkpoint, tmp_path, capsys):
    file = record(copied, tmp_path / "run.safetensors")
    edit_weight(copied, "model.layers.1.self_attn.kv_b_proj.w_uv", lambda values: 1.02 * values)
    status, found = judged(capsys, copied, file, "--reference", tiny_checkpoint)
    assert status == 2 and ": stale: it was recorded of manifest " in found["error"]
    assert found["error"].endswith("record it again")
    other = checkpoints.write(tmp_path / "other", seed=1, **TINY)
    status, found = judged(capsys, other, file)
    assert status == 2 and "is a recording of another checkpoint (sha256 " in found["error"]
    status, found = judged(capsys, EXAMPLE, file)
    assert status == 2 and "vocab_size is 4096, the bundle's model has 320" in found["error"]
    with safe_open(file, framework="np") as opened:
        tensors, facts = {n: opened.get_tensor(n) for n in opened.keys()}, json.loads(opened.metadata()[recording.KEY])  # noqa: SIM118
    save_file(tensors, file, metadata={recording.KEY: json.dumps(facts | {"version": 0})})
    status, found = judged(capsys, tiny_checkpoint, file)
    assert status == 2 and found["error"].endswith("is version 0, this version reads 1; record it again")


def test_a_reference_is_needed(tiny_bundle, capsys):
    assert cli.main(["validate", str(tiny_bundle), "--json"]) == 2
    assert "give --reference" in capsys.readouterr().err
