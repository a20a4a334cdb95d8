"""What the validation tests share: one validated tiny bundle, and bundles damaged on purpose."""

import hashlib
import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import onnx
import pytest
import torch

from latentrt.runtime.bundle.reader import Bundle
from latentrt.validation.stages import exported_graph
from tests import checkpoints
from tests.conftest import EXAMPLE

TOKENS, FEW_TOKENS = 300, 100  # the first make two windows, of 256 and 44


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small only lose by threads, fifty-fold where cores are shared."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.sched_getaffinity", lambda process: {0})
        yield


@pytest.fixture(scope="session", autouse=True)
def export_once(tmp_path_factory):
    """The graph of a checkpoint is exported once for all tests (10 s each); the temporary folders outlive their users."""
    real, kept = exported_graph.export, {}

    def export(checkpoint, folder, page_size, threads):
        key = checkpoint.path
        if key not in kept:
            kept[key] = real(checkpoint, tmp_path_factory.mktemp("graph"), page_size, threads)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exported_graph, "export", export)
        yield


@pytest.fixture(scope="session")
def validated(tiny_bundle, tiny_checkpoint):
    """Evidence and comparison of the tiny fp32 bundle."""
    from latentrt.validation.validate import validate

    return validate(tiny_bundle, tiny_checkpoint, count=TOKENS)


@pytest.fixture(scope="session")
def int8_pair(traced, tmp_path_factory):
    """(bundle, checkpoint): int8 at the exact level, tied embeddings, no q_lora_rank."""
    folder = tmp_path_factory.mktemp("int8")
    checkpoint = checkpoints.write(
        folder / "checkpoint", hidden_size=64, kv_lora_rank=32, num_attention_heads=2, q_lora_rank=None,
        tie_word_embeddings=True, num_hidden_layers=2,
    )  # fmt: skip
    return traced.build_once("int8", checkpoint, folder / "bundle", "cpu", "int8", "exact"), checkpoint


@pytest.fixture
def copied(tiny_bundle, tmp_path) -> Path:
    """A copy of the tiny bundle, to be damaged."""
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture(scope="session")
def torch_bundle(traced, tiny_checkpoint, tmp_path_factory) -> Path:
    """The tiny checkpoint in fp32 for target torch, whose kernels are plain functions that a test can replace."""
    return traced.build_once("tiny.torch", tiny_checkpoint, tmp_path_factory.mktemp("torch") / "bundle", "torch", "fp32")


@pytest.fixture
def torch_copy(torch_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(torch_bundle, tmp_path / "torch"))


@pytest.fixture
def gpu_copy(gpu_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(gpu_bundle, tmp_path / "gpu"))


@pytest.fixture(scope="session")
def stand_ins():
    """A context in which builds for GPUs get stand-ins for plans and kernels, which nothing here reads."""
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13: the package that builds")
    from latentrt.export.lowering.tensorrt import gpu_kernels
    from latentrt.export.lowering.tensorrt import package as tensorrt_package

    def run(job, folder, progress):
        Path(job.plan).write_bytes(b"plan %d" % job.compute_capability)
        Path(job.network).write_text("[]")

    @contextmanager
    def patched():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensorrt_package, "run", run)
            patch.setattr(gpu_kernels, "compile_all", lambda specs, capability, progress=None: [])
            yield

    return patched


@pytest.fixture(scope="session")
def gpu_bundle(traced, stand_ins, tmp_path_factory) -> Path:
    """The example for sm86 (bf16) and sm89 (fp8)."""
    with stand_ins():
        return traced.build_once("example.gpu", EXAMPLE, tmp_path_factory.mktemp("gpu") / "bundle", "sm86,sm89")


def edit_graph(bundle_path: Path, change, target: str | None = None, native: bool = False) -> None:
    """Changes the ONNX graphs of a target (the first one; native: those with own kernels) and gives them their proper names and
    digests in the manifest."""
    bundle = Bundle(bundle_path)
    entry = bundle.manifest.targets[target or next(iter(bundle.manifest.targets))]
    for ref in (engine.native if native else engine.onnx or engine.graph for engine in entry.engines.values()):
        model = onnx.load(str(bundle.file(ref)), load_external_data=False)
        change(model)
        content = model.SerializeToString()
        digest = hashlib.sha256(content).hexdigest()
        name = f"{digest[:40]}.onnx"
        (bundle_path / "files" / name).write_bytes(content)
        _edit_manifest(bundle_path, {ref.file: name, ref.sha256: digest}, {name: len(content)})


def edit_weight(bundle_path: Path, name: str, change) -> None:
    """Changes one stored float32 tensor in place; the manifest gets the new digest, so only numbers can tell."""
    import numpy as np

    for file in (bundle_path / "files").glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        if name in header:
            begin, end = (8 + length + o for o in header[name]["data_offsets"])
            values = change(np.frombuffer(bytes(data[begin:end]), np.float32))
            data[begin:end] = values.astype(np.float32).tobytes()
            old = hashlib.sha256(file.read_bytes()).hexdigest()
            file.write_bytes(data)
            _edit_manifest(bundle_path, {old: hashlib.sha256(data).hexdigest()}, {})
            return
    raise KeyError(name)


def _edit_manifest(bundle_path: Path, renamed: dict[str, str], sizes: dict[str, int]) -> None:
    def walk(value):
        if isinstance(value, dict):
            value = {k: walk(v) for k, v in value.items()}
            return value | {"size": sizes[value["file"]]} if value.get("file") in sizes else value
        if isinstance(value, list):
            return [walk(v) for v in value]
        return renamed.get(value, value) if isinstance(value, str) else value

    file = bundle_path / "manifest.json"
    file.write_text(json.dumps(walk(json.loads(file.read_text()))))
