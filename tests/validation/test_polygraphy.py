"""Polygraphy over bundles: its Comparator takes our runner, its command line finds it, and every backend gives the same."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import Comparator, CompareFunc
from polygraphy.json import load_json

from latentrt.plugins.step_graph import caches
from latentrt.runtime.bundle.manifest import Target
from latentrt.runtime.bundle.reader import Bundle
from latentrt.validation.errors import ValidationError
from latentrt.validation.polygraphy import step_inputs
from latentrt.validation.polygraphy.runner import BundleRunner

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LOADER = ROOT / "validation" / "polygraphy" / "step_inputs.py"


def target(bundle: Path) -> Target:
    return Bundle(bundle).target(None)[1]


def graph(bundle: Path) -> Path:
    opened = Bundle(bundle)
    return opened.file(opened.target(None)[1].engines["absorbed"].graph)


def outputs(bundle: Path, **options) -> list[dict]:
    with BundleRunner(bundle, **options) as runner:
        return [runner.infer(feeds) for feeds in step_inputs.step_inputs(Bundle(bundle))]


def test_comparator_takes_the_runner_beside_onnxruntimes(tiny_bundle):
    runners = [OnnxrtRunner(SessionFromOnnx(str(graph(tiny_bundle)))), BundleRunner(tiny_bundle)]
    results = Comparator.run(runners, data_loader=list(step_inputs.step_inputs(Bundle(tiny_bundle))))
    assert Comparator.compare_accuracy(results, compare_func=CompareFunc.simple(atol=0, rtol=0))  # the same kernels
    (_, found), _ = results.items()
    assert len(found) == len(step_inputs.STEPS)
    assert all(np.isfinite(value).all() for step in found for value in step.values())


@pytest.mark.parametrize("cache_format", ["float32", "float16", "fp8", "int6", "int4"])
def test_caches_of_every_format(traced, tiny_checkpoint, tmp_path, cache_format):
    """Random cells are ones that the format's encoder makes: finite logits, and only the rows' cells change."""
    name = "tiny.fp32.poly." + cache_format
    path = traced.build_once(name, tiny_checkpoint, tmp_path / "bundle", "cpu", "fp32", cache_format=cache_format)
    feeds = list(step_inputs.step_inputs(Bundle(path)))
    for given, found in zip(feeds, outputs(path), strict=True):
        assert np.isfinite(found["logits"]).all() and len(found["logits"]) == given["num_tokens"][0]
        for before, after in caches(target(path).cache.layers).items():
            changed = (found[after] != given[before]).any(-1).sum()
            assert 0 < changed <= given["num_tokens"][0]


def test_own_kernels_and_the_torch_backend(traced, tiny_checkpoint, tiny_bundle, tmp_path):
    path = traced.build_once("tiny.int8", tiny_checkpoint, tmp_path / "bundle", "cpu", "int8")
    pairs = [(outputs(path, kernels="native"), outputs(path, kernels="onnxruntime"), 0.1),
             (outputs(tiny_bundle, backend="torch", device="cpu"), outputs(tiny_bundle), 1e-5)]  # fmt: skip
    for ours, theirs, limit in pairs:
        for one, other in zip(ours, theirs, strict=True):
            for name, value in one.items():
                assert np.linalg.norm(value - other[name]) < limit * np.linalg.norm(other[name])


def test_bfloat16_caches_are_torch_tensors(traced, tiny_checkpoint, tmp_path):
    path = traced.build_once("tiny.torch.bf16", tiny_checkpoint, tmp_path / "bundle", "torch", "bf16")
    for found in outputs(path, device="cpu"):
        assert found["latent_cache.0.updated"].dtype == torch.bfloat16 and np.isfinite(found["logits"]).all()


def test_what_is_refused(traced, tiny_checkpoint, tiny_bundle, tmp_path):
    ranks = traced.build_once("tiny.torch.2", tiny_checkpoint, tmp_path / "ranks", "torch", "fp32", ranks=2)
    with pytest.raises(ValidationError, match="is for 2 ranks, whose caches are in other processes; accepted: targets of one"):
        BundleRunner(ranks)
    feeds = next(step_inputs.step_inputs(Bundle(tiny_bundle)))
    feeds |= {name: np.repeat(feeds[name], 40, 0) for name in caches(target(tiny_bundle).cache.layers)}
    refused = pytest.raises(ValidationError, match=r"caches have \d+ pages, accepted: up to 65")
    with BundleRunner(tiny_bundle) as runner, refused:
        runner.infer(feeds)
    with pytest.raises(ValidationError, match=r"part\.onnx: is not in a bundle; give a graph of BUNDLE/files"):
        step_inputs.bundle_of(tmp_path / "part.onnx")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """What an install would add to Python's path: the entry points of pyproject.toml."""
    folder = tmp_path_factory.mktemp("site")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["polygraphy.run.plugins"]
    info = folder / "latentrt-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: latentrt\nVersion: 0\n")
    lines = "".join(f"{name} = {place}\n" for name, place in points.items())
    (info / "entry_points.txt").write_text(f"[polygraphy.run.plugins]\n{lines}")
    return folder


def polygraphy(installed: Path, folder: Path, *arguments) -> str:
    code = "import sys; from polygraphy.tools import main; sys.exit(main())"
    env = os.environ | {"POLYGRAPHY_AUTOINSTALL_DEPS": "0", "PYTHONPATH": f"{ROOT}{os.pathsep}{installed}"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    child = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, check=False)
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout


@pytest.mark.parametrize("options", [(), ("--latentrt-backend", "torch", "--latentrt-device", "cpu")])
def test_polygraphy_run(installed, tiny_bundle, tmp_path, options):
    """docs/polygraphy.md's commands: a loader script, and inputs in a file."""
    compared = "--onnxrt", "--latentrt", *options, "--compare", "snr", "--snr-threshold", "90"
    text = polygraphy(installed, tmp_path, "run", graph(tiny_bundle), *compared, "--data-loader-script", LOADER)
    assert "Passed: 3/3 iterations" in text


def test_inputs_in_a_file(installed, tiny_bundle, tmp_path):
    command = [sys.executable, "-m", "latentrt.validation.polygraphy.step_inputs", str(tiny_bundle), "-o", "inputs.json"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert len(load_json(str(tmp_path / "inputs.json"))) == len(step_inputs.STEPS)
    given = "--onnxrt", "--load-inputs", "inputs.json", "--save-outputs", "outputs.json"
    polygraphy(installed, tmp_path, "run", graph(tiny_bundle), *given)
    given = "--latentrt", "--load-inputs", "inputs.json", "--load-outputs", "outputs.json"
    assert "Passed: 3/3 iterations" in polygraphy(installed, tmp_path, "run", graph(tiny_bundle), *given)


