"""A wrong part as files: plain onnxruntime and Polygraphy show the very error, and that everything before it is right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from latentrt import cli
from latentrt.export.checkpoint import Checkpoint
from latentrt.runtime.bundle.reader import Bundle
from latentrt.validation import tokens
from latentrt.validation.bisect import bisect, reproduce
from latentrt.validation.bisect.bisect import Bisect
from latentrt.validation.errors import ValidationError
from latentrt.validation.stages.executor import Executor
from tests.conftest import EXAMPLE
from tests.validation import defects
from tests.validation.conftest import edit_graph

pytestmark = pytest.mark.slow


def deep(name: str):
    return pytest.param(name, marks=pytest.mark.deep)


def extracted(bundle: Path, checkpoint: Path, folder: Path, target: str | None = None, part: str | None = None) -> Bisect:
    opened, source = Bundle(bundle), Checkpoint(checkpoint)
    name, entry = opened.target(target)
    executor = Executor(opened, name, entry, *(() if entry.backend == "onnxruntime" else ("torch", "cpu")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bisect, "audit", lambda config, raw: [])
        job = Bisect(executor, source, tokens.load(source, None, 300, entry.limits.max_context))
        job.extract(folder, part)
        job.run()
    return job


def errors(folder: Path) -> dict[str, tuple[float, float]]:
    """Error and limit by tensor."""
    return {tensor: (error, limit) for _, tensor, error, limit in reproduce.compare(folder)}


def alone(folder: Path) -> subprocess.CompletedProcess:
    """reproduce.py where latentrt cannot be imported."""
    code = "import runpy, sys; sys.modules['latentrt'] = None; runpy.run_path('reproduce.py', run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)


def polygraphy(folder: Path, number: int = 0) -> subprocess.CompletedProcess:
    """A command of the folder's README."""
    text = (folder / "README.md").read_text().split("    polygraphy ")[1 + number].split("\n\n")[0]
    command = [sys.executable if word == "python" else word for word in text.replace("\\\n", " ").split()]
    code = "import sys; from polygraphy.tools import main; sys.exit(main())"
    env = os.environ | {"POLYGRAPHY_AUTOINSTALL_DEPS": "0"}
    given = [sys.executable, "-c", code, *command]
    return subprocess.run(given, capture_output=True, text=True, cwd=folder, env=env, check=False)


@pytest.mark.parametrize("name", ["wrong_mscale", *map(deep, ("causal_mask_off_by_one", "experts_permuted", "stuck_weight"))])
def test_defects_of_a_cpu_target(copied, tiny_checkpoint, tmp_path, monkeypatch, name):
    getattr(defects, name)(copied, monkeypatch)
    shows(extracted(copied, tiny_checkpoint, tmp_path / "part"), tmp_path / "part")


@pytest.mark.parametrize("name", ["transposed_scale", "fp8_saturation"])
def test_defects_of_a_gpu_target(gpu_copy, tmp_path, monkeypatch, name):
    """The ONNX graph with function bodies and casts."""
    getattr(defects, name)(gpu_copy, monkeypatch)
    shows(extracted(gpu_copy, EXAMPLE, tmp_path / "part", "sm89"), tmp_path / "part")


@pytest.mark.deep
@pytest.mark.parametrize("name", ["group_limit_ignored", "routed_scaling_factor_dropped"])
def test_defects_of_a_torch_target(torch_copy, tiny_checkpoint, tmp_path, monkeypatch, name):
    getattr(defects, name)(torch_copy, monkeypatch)
    shows(extracted(torch_copy, tiny_checkpoint, tmp_path / "part"), tmp_path / "part")


def test_a_defect_of_what_runs_the_graph(torch_copy, tiny_checkpoint, tmp_path, monkeypatch):
    """It is not in the files, which say so."""
    defects.half_split_rope(torch_copy, monkeypatch)
    job = extracted(torch_copy, tiny_checkpoint, tmp_path / "part")
    (note,) = job.extraction.notes
    assert note.startswith("this step on ONNX Runtime does not show the error: it is in what ran it")
    assert alone(tmp_path / "part").returncode == 0 and note in (tmp_path / "part" / "README.md").read_text()


def shows(job: Bisect, folder: Path) -> None:
    defect, found = job.found.defects[0], errors(folder)
    assert job.extraction.notes == []
    beyond = [tensor for tensor, (error, limit) in found.items() if not error <= limit]
    assert beyond == [defect.tensor]
    run = alone(folder)
    assert run.returncode == 1 and f"{defect.tensor:26}" in run.stdout and "BEYOND" in run.stdout, run.stderr
    model = onnx.load(folder / "part.onnx", load_external_data=False)
    assert not any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer)
    told = json.loads((folder / "part.json").read_text())
    assert told["part"] == defect.part and told["defect"]["tensor"] == defect.tensor
    if defect.spread:  # Polygraphy judges numbers, not choices
        text = polygraphy(folder)
        assert text.returncode == 1 and "FAILED" in text.stdout and "Traceback" not in text.stderr, text.stdout + text.stderr


@pytest.mark.deep
def test_own_kernels_alone(traced, tiny_checkpoint, tmp_path):
    """A defect of the graph with own kernels is extracted with them; reproduce.py says what it needs."""
    path = traced.build_once("tiny.int8", tiny_checkpoint, tmp_path / "bundle", "cpu", "int8")

    def change(model):
        for node in defects.of_type(model, "Mla"):
            defects.set_attribute(node, "softmax_scale", 20**-0.5)

    edit_graph(path, change, native=True)
    job = extracted(path, tiny_checkpoint, tmp_path / "part")
    assert job.extraction.notes == ["own kernels alone show the error: ONNX Runtime's, in the bundle's plain graph, do not"]
    error, limit = errors(tmp_path / "part")[job.found.defects[0].tensor]
    assert error > limit
    assert "reproduce.py needs latentrt" in (tmp_path / "part" / "README.md").read_text()
    assert "latentrt" in alone(tmp_path / "part").stderr

    def plain_too(model):
        for node in defects.of_type(model, "MlaAttention"):
            defects.set_attribute(node, "softmax_scale", 20**-0.5)

    edit_graph(path, plain_too)
    job = extracted(path, tiny_checkpoint, tmp_path / "plain")
    assert job.extraction.notes == [] and alone(tmp_path / "plain").returncode == 1


@pytest.mark.parametrize("part", ["embed", "model.layers.1", "head"])
def test_any_part_of_a_right_engine(tiny_bundle, tiny_checkpoint, tmp_path, part):
    extracted(tiny_bundle, tiny_checkpoint, tmp_path / "part", part=part)
    assert alone(tmp_path / "part").returncode == 0
    run = polygraphy(tmp_path / "part")
    assert run.returncode == 0, run.stdout + run.stderr
    with np.load(tmp_path / "part" / "engine.npz") as saved:
        for name, value in reproduce.run(tmp_path / "part").items():
            np.testing.assert_array_equal(saved[name], value)


def test_polygraphy_cuts_at_the_wrong_node(copied, tiny_checkpoint, tmp_path, monkeypatch):
    defects.wrong_mscale(copied, monkeypatch)
    job = extracted(copied, tiny_checkpoint, tmp_path / "part")
    run = polygraphy(tmp_path / "part", 1)
    assert run.returncode == 0, run.stdout + run.stderr
    model = onnx.load(tmp_path / "part" / "reduced.onnx")
    assert model.graph.node[-1].name == job.found.defects[0].node


def test_command(copied, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    defects.wrong_mscale(copied, monkeypatch)
    given = ["validate", str(copied), "--reference", str(tiny_checkpoint), "--tokens", "300"]
    assert cli.main([*given, "--bisect", "--extract", str(tmp_path / "part")]) == 1
    assert f"extracted: {tmp_path / 'part'}" in capsys.readouterr().out.replace("\n", "")
    assert cli.main([*given, "--bisect", "--extract", str(tmp_path / "part")]) == 2
    assert "exists and is not an empty folder; give another one for --extract" in capsys.readouterr().err.replace("\n", " ")
    for options, words in ((["--extract", "x"], "--extract needs --bisect"), (["--bisect", "--part", "head"], "--part needs")):
        assert cli.main([*given, *options]) == 2
        assert words in capsys.readouterr().err.replace("\n", " ")


def test_large_weights_lie_beside_the_graph(tiny_bundle, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("latentrt.validation.bisect.extract.LARGEST_FILE", 1000)
    extracted(tiny_bundle, tiny_checkpoint, tmp_path / "part", part="model.layers.1")
    graph, weights = (tmp_path / "part" / name for name in ("part.onnx", "part.weights"))
    assert graph.stat().st_size < weights.stat().st_size
    assert alone(tmp_path / "part").returncode == 0 and polygraphy(tmp_path / "part").returncode == 0


def test_unknown_parts_are_refused(tiny_bundle, tiny_checkpoint, tmp_path):
    with pytest.raises(ValidationError, match=r"part is 'layer 3', accepted: embed, model\.layers\.0, .*, head"):
        extracted(tiny_bundle, tiny_checkpoint, tmp_path / "part", part="layer 3")


def test_without_polygraphy_its_files_are_left_out(tiny_bundle, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "polygraphy.comparator", None)
    job = extracted(tiny_bundle, tiny_checkpoint, tmp_path / "part", part="head")
    assert job.extraction.notes == ['no files for Polygraphy: it is not installed; pip install "latentrt[polygraphy]"']
    assert not (tmp_path / "part" / "inputs.json").exists() and alone(tmp_path / "part").returncode == 0
