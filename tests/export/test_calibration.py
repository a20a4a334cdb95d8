"""Static activation scales: inputs of transformers' own linears, memory, sample files, and what a build does with them."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch

from latentrt.export import calibration
from latentrt.export.calibration import activation_scales
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.errors import BuildError, CheckpointError
from latentrt.export.lowering.tensorrt import gpu_kernels
from latentrt.export.lowering.tensorrt import package as tensorrt_package
from latentrt.export.models.deepseek_v2.model import DecoderLayer
from latentrt.export.models.deepseek_v2.weights import weights
from latentrt.export.samples import Samples, read_samples
from latentrt.runtime.bundle.reader import Bundle
from tests import checkpoints
from tests.builds import build
from tests.conftest import EXAMPLE

TOKENS = checkpoints.random_tokens([200, 64, 1, 130], seed=5)
NEEDS_TENSORRT = pytest.mark.skipif(tensorrt_package.find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx-cu13")


@torch.no_grad()
def largest_of_transformers(folder: Path, sequences: list[list[int]]) -> dict[str, float]:
    """Weight name of every nn.Linear of transformers' model -> largest |input|."""
    model, largest = checkpoints.reference(folder), {}

    def watch(name):
        def hook(module, inputs):
            largest[name] = max(largest.get(name, 0.0), float(inputs[0].abs().max()))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(watch(f"{name}.weight"))
    for sequence in sequences:
        checkpoints.reference_logits(model, sequence)
    return largest


@pytest.mark.parametrize("q_lora_rank", [24, None])
def test_scales_are_the_largest_inputs_of_transformers_linears(q_lora_rank, small_checkpoint, tmp_path):
    folder = small_checkpoint if q_lora_rank else checkpoints.write(tmp_path / "c", 3, q_lora_rank=None, attention_bias=True)
    checkpoint = Checkpoint(folder)
    parts: list[float] = []
    scales = activation_scales(checkpoint, Samples(tuple(map(tuple, TOKENS))), parts.append)
    expected = largest_of_transformers(folder, TOKENS)
    linears = [w.name for w in weights(checkpoint.config) if w.role == "linear"]
    assert list(scales) == linears and len(linears) == 3 * (4 if q_lora_rank else 3) + 3 * 3
    for name in linears:
        assert scales[name] * 448 == pytest.approx(expected[name], rel=1e-4), name
    assert parts == [1] * checkpoint.config.num_hidden_layers


def test_memory_holds_one_layer(small_checkpoint, monkeypatch):
    """Live parameters of decoder layers while every layer is loaded: none of the one before."""
    checkpoint, live, load = Checkpoint(small_checkpoint), [], calibration._load_layer

    def counted(*arguments):
        live.append(sum(isinstance(o, DecoderLayer) for o in gc.get_objects()))
        return load(*arguments)

    before = sum(isinstance(o, DecoderLayer) for o in gc.get_objects())
    monkeypatch.setattr(calibration, "_load_layer", counted)
    threads = torch.get_num_threads()
    activation_scales(checkpoint, Samples(((1, 2, 3),)))
    assert live == [before] * checkpoint.config.num_hidden_layers and torch.get_num_threads() == threads


def test_text_and_its_tokens_are_the_same_samples(tmp_path):
    from tokenizers import Tokenizer

    checkpoint, text = Checkpoint(EXAMPLE), (EXAMPLE / "held_out.txt").read_text()[:6000]
    ids = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json")).encode(text).ids
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.json").write_text(json.dumps([ids[:512], ids[512:1024], ids[1024:1536], ids[1536:]], indent=1))
    first, second = (read_samples(tmp_path / n, checkpoint) for n in ("a.txt", "b.json"))
    assert 1536 < len(ids) <= 2048 and first == second and first.digest == second.digest
    assert first.digest != Samples(first.sequences[:3]).digest


@pytest.mark.parametrize(("content", "words"), [
    ("", ["is empty"]), (" \n", ["is empty"]), ("[]", ["holds '[]'", "[[1, 2, 3], [4]]"]), ("[[1, 2]", ["begins like JSON"]),
    ("[1, 2]", ["sequence 0 is '1'"]), ("[[1], []]", ["sequence 1 is '[]'"]), ('[["a"]]', ["sequence 0"]),
    ("[[true]]", ["sequence 0"]), ('{"ids": [[1]]}', ["holds", "expected a list of lists"]),
    ("[[1], [7, 101]]", ["sequence 1 has token id 101", "accepted: 0 to 100"]), ("[[-1]]", ["token id -1"]),
    (json.dumps([[1] * 257]), ["has 257 tokens", "1 to 256 (max_position_embeddings)", "cut it"]),
    (b"\xff\xfe\x00", ["not UTF-8"]), ("Some text.", ["is text", "has no tokenizer.json", "JSON list"]),
    (None, ["cannot be read"]),
])  # fmt: skip
def test_unusable_sample_files_are_named(content, words, small_checkpoint, tmp_path):
    file = tmp_path / "samples"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BuildError) as error:
        read_samples(file, Checkpoint(small_checkpoint))
    assert str(file) in str(error.value) and all(w in str(error.value) for w in words), error.value


def test_a_damaged_tokenizer_is_named(small_checkpoint, tmp_path):
    shutil.copytree(small_checkpoint, tmp_path / "c")
    (tmp_path / "c" / "tokenizer.json").write_text("{}")
    (tmp_path / "text").write_text("Some text.")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: transformers .* makes no tokenizer of it"):
        read_samples(tmp_path / "text", Checkpoint(tmp_path / "c"))


@pytest.mark.parametrize(("target", "precision", "activations", "file", "words"), [
    ("cpu", "auto", "static", "f", ["target cpu is built in int8", "only fp8"]),
    ("sm89", "bf16", "static", "f", ["target sm89 is built in bf16"]),
    ("cpu,sm86", "auto", "static", "f", ["target cpu is built in int8, target sm86 is built in bf16"]),
    ("sm89", "auto", "static", None, ["no sample tokens", "--calibration FILE"]),
    ("sm89", "auto", "dynamic", "f", ["'dynamic', which needs none", "--activations static"]),
    ("cpu", "auto", "wild", None, ["activations is 'wild', accepted: dynamic, static"]),
])  # fmt: skip
def test_refused_before_anything_is_read(target, precision, activations, file, words, tmp_path):
    if "sm89" in target and tensorrt_package.find_spec("tensorrt_rtx") is None:
        pytest.skip("pip install tensorrt-rtx-cu13")
    options = dict(activations=activations, calibration=file and tmp_path / "missing")
    with pytest.raises(BuildError) as error:
        build(tmp_path / "no checkpoint", tmp_path / "bundle", target, precision, **options)
    assert all(w in str(error.value) for w in words), error.value


@pytest.mark.slow
@NEEDS_TENSORRT
def test_build_records_samples_and_builds_anew_for_others(fast_trace, monkeypatch, tmp_path):
    """Same tokens: nothing to do, whatever the file; others: built anew; another choice of activations: needs --force."""
    monkeypatch.setattr(gpu_kernels, "compile_all", lambda specs, capability, progress: [])

    def run(job, folder, progress):
        Path(job.plan).write_bytes(b"plan")
        Path(job.network).write_text("[]")

    def static(tokens: list, name: str) -> bool:
        (tmp_path / name).write_text(json.dumps(tokens))
        options = dict(activations="static", calibration=tmp_path / name)
        return build(EXAMPLE, tmp_path / "bundle", "sm89", **options)["built"]

    def onnx(target) -> str:
        return target.engines["absorbed"].onnx.sha256

    monkeypatch.setattr(tensorrt_package, "run", run)
    assert static([[1, 2, 3]], "a") and not static([[1, 2, 3]], "a") and not static([[1, 2, 3]], "b")
    first = Bundle(tmp_path / "bundle").target("sm89")[1]
    calibrated = {"activations": "static", "calibration": Samples(((1, 2, 3),)).digest}
    assert first.options == {"weights": "inputs", "prefill": "expanded"} | calibrated
    assert static([[1, 2, 4]], "a")
    second = Bundle(tmp_path / "bundle").target("sm89")[1]
    assert second.options["calibration"] == Samples(((1, 2, 4),)).digest and onnx(second) != onnx(first)
    assert second.weight_set == first.weight_set
    with pytest.raises(BuildError, match=r"has target sm89 already \(fp8.*static.*--force"):
        build(EXAMPLE, tmp_path / "bundle", "sm89")
    options = dict(activations="static", calibration=tmp_path / "a", weights="embedded", force=True)
    build(EXAMPLE, tmp_path / "bundle", "sm89, sm86,sm89", **options)  # each takes what concerns it
    targets = Bundle(tmp_path / "bundle").manifest.targets
    assert targets["sm86"].options == {"weights": "embedded", "prefill": "absorbed"}
    assert targets["sm89"].options == second.options | {"weights": "embedded", "prefill": "absorbed"}
