"""What a build refuses before its first long step, and what it leaves alone."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from latentrt.export.checkpoint import Checkpoint
from latentrt.export.errors import BuildError
from latentrt.runtime.bundle import writer
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.errors import BundleError
from tests import checkpoints, gguf_writing
from tests.builds import build

pytestmark = pytest.mark.usefixtures("fast_trace")

ROOT = Path(__file__).parents[1]
COMMANDS = """
import contextlib, io, json, sys
from latentrt.cli import main
for arguments in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main(["build", *arguments])
    slow = [name for name in ("torch", "onnx", "onnx_ir", "onnxruntime", "transformers", "triton") if name in sys.modules]
    print(json.dumps([status, said.getvalue(), slow]))
"""


@pytest.fixture
def nothing_is_read(monkeypatch):
    """A tensor that is read, or a digest that is taken, fails the test."""
    for name in ("read", "read_rows", "file_digests"):
        monkeypatch.setattr(Checkpoint, name, lambda *args, **kwargs: pytest.fail("the build has begun"))


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize(("sizes", "options", "words"), [
    ({"kv_lora_rank": 40}, ("sm89", "fp8"), ["mla_attention", "kv_lora_rank is 40", "powers of two", "--target cpu"]),
    ({"moe_intermediate_size": 40}, ("sm86", "bf16"), ["moe_experts", "moe_intermediate_size is 40", "multiples of 16"]),
    ({"qk_rope_head_dim": 24}, ("sm89", "bf16"), ["mla_attention", "qk_rope_head_dim is 24"]),
    ({"qk_nope_head_dim": 24}, ("sm89", "fp8"), ["mla_prefill", "qk_nope_head_dim is 24", "--prefill absorbed"]),
], ids=["rank", "experts", "rope", "nope"])  # fmt: skip
def test_shapes_that_no_kernel_of_the_target_takes(tmp_path, sizes, options, words):
    fits = {"kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "hidden_size": 64,
            "num_attention_heads": 4}  # fmt: skip
    checkpoint = checkpoints.write(tmp_path / "c", **fits | sizes)
    with pytest.raises(BuildError) as error:
        build(checkpoint, tmp_path / "b", *options)
    assert all(word in str(error.value) for word in words) and not (tmp_path / "b").exists()


@pytest.mark.usefixtures("nothing_is_read")
def test_too_little_space_is_told_with_the_bytes_and_the_folder(tiny_checkpoint, tmp_path, monkeypatch):
    """float32 weights of the tiny model are about its file's size, and small files are allowed 16 MiB."""
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(0, 0, 1000))
    with pytest.raises(BundleError) as error:
        build(tiny_checkpoint, tmp_path / "b", "cpu", "fp32")
    needed = int(str(error.value).split(" bytes")[0].split("(")[-1])
    weights = (tiny_checkpoint / "model.safetensors").stat().st_size
    assert weights < needed < 1.1 * weights + 2**24 + 1
    assert str(tmp_path / "b") in str(error.value) and not (tmp_path / "b").exists()


def test_what_is_up_to_date_writes_nothing(tiny_checkpoint, tiny_bundle, monkeypatch):
    """As on a read-only mount: no lock, no folder."""
    monkeypatch.setattr(writer, "open_writer", lambda *args, **kwargs: pytest.fail("opened for writing"))
    monkeypatch.setattr(writer.os, "access", lambda *args: False)
    assert not build(tiny_checkpoint, tiny_bundle, "cpu", "fp32")["built"]
    with pytest.raises(BundleError, match="is not writable"):
        build(tiny_checkpoint, tiny_bundle, "cpu", "fp32", force=True)


def test_files_of_others_in_a_bundle_are_left_alone(tiny_checkpoint, tiny_bundle, tmp_path, monkeypatch):
    """Of hubs, file managers and their owner: also while a target is built anew."""
    monkeypatch.setattr("latentrt.runtime.smoke_test.run", lambda bundle, name: None)
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    names = (".DS_Store", "README.md", ".gitattributes", "notes.txt", "files/.nfs0001", "evidence/plot.png")
    for name in names:
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_text("mine")
    assert build(tiny_checkpoint, bundle, "cpu", "fp32", force=True)["built"]
    assert all((bundle / name).read_text() == "mine" for name in names) and Bundle(bundle).verify() == []


def test_notes_are_told_once(tiny_checkpoint, tiny_bundle, tmp_path):
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "c")
    (checkpoint / "consolidated.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    notes = build(checkpoint, tiny_bundle, "cpu", "fp32")["notes"]
    assert len(notes) == 1 and "consolidated.safetensors not read" in json.dumps(notes)


def no_o_proj(tensors: dict) -> None:
    del tensors["model.layers.1.self_attn.o_proj.weight"]


def wrong_scales(tensors: dict) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name], tensors[f"{name}_scale_inv"] = tensors[name].to(torch.float8_e4m3fn), torch.ones(3, 3)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def other_gguf(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    gguf_writing.write(folder / "m.gguf", {}, {}, "llama")


BAD_CHECKPOINTS = [  # what is done to a good one; words of the refusal
    (lambda c: checkpoints.edit_tensors(c, no_o_proj), ["missing tensor model.layers.1.self_attn.o_proj.weight"]),
    (lambda c: checkpoints.edit_tensors(c, wrong_scales), ["o_proj.weight_scale_inv", "shape [3, 3]", "accepted"]),
    (lambda c: checkpoints.edit_config(c, kv_lora_rank=32), ["config.json says kv_lora_rank 32, the tensors have 64"]),
    (lambda c: checkpoints.edit_config(c, topk_method="noaux_tc"), ["config.json: topk_method is 'noaux_tc'"]),
    (lambda c: checkpoints.edit_config(c, model_type="llama"), ["model_type is 'llama', accepted: 'deepseek_v2'"]),
    (truncate, ["model.safetensors: not a whole safetensors file", "download it again"]),
    (other_gguf, ["m.gguf: general.architecture is 'llama'; accepted: 'deepseek2'"]),
    (lambda c: (c / "tokenizer.json").write_text("{}"), ["tokenizer.json: tokenizers", "cannot read it"]),
    (lambda c: (c / "generation_config.json").write_text('{"top_p": 2}'), ["generation_config.json: top_p is 2, accepted"]),
]
BAD_OPTIONS = [
    (["--max-context", "9999999"], ["max_context is 9999999, accepted: 1 to 256 (max_position_embeddings)"]),
    (["--target", "sm70"], ["unknown target 'sm70', accepted: cpu, torch, sm80"]),
    (["--precision", "fp8"], ["precision 'fp8' is not to be had on cpu; accepted: auto, int8, int4, fp32"]),
    (["--accuracy", "best"], ["accuracy is 'best', accepted: fast, exact"]),
    (["--cache-format", "bfloat16"], ["cache_format is 'bfloat16', accepted for target cpu: float32, float16"]),
    (["--target", "sm89", "--cache-format", "float16"], ["accepted for target sm89: auto, bfloat16"]),
    (["--target", "sm89", "--activations", "static"], ["there are no sample tokens; give them with --calibration FILE"]),
    (["--out", "build.py"], ["build.py: is a file; give a folder for the bundle"]),
    (["--out", "docs"], ["docs: holds", "which is no part of a bundle; give another folder"]),
]


def test_what_headers_and_options_tell_is_refused_before_the_slow_imports(tiny_checkpoint, tmp_path):
    """In a process of its own, where nothing is imported yet: what has been refused so far needed no torch."""
    calls = [[str(tiny_checkpoint), "--out", str(tmp_path / "b"), *options] for options, _ in BAD_OPTIONS]
    for number, (spoil, _) in enumerate(BAD_CHECKPOINTS):
        spoil(shutil.copytree(tiny_checkpoint, folder := tmp_path / f"c{number}"))
        calls.append([str(folder), "--out", str(tmp_path / "b")])
    command = [sys.executable, "-c", COMMANDS]
    child = subprocess.run(command, cwd=ROOT, input=json.dumps(calls), capture_output=True, text=True, check=True)
    answers = map(json.loads, child.stdout.splitlines())
    for call, (_, words), (status, said, slow) in zip(calls, BAD_OPTIONS + BAD_CHECKPOINTS, answers, strict=True):
        assert (status, slow) == (2, []) and all(word in said for word in words), (call, status, said, slow)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("options", "message"), [
    (dict(precision="fp32", cache_format="fp8"), r"kv_lora_rank is 20, .*; it takes a kv_lora_rank that 32 divides"),
    (dict(precision="int8", cache_format="int6"), r"kv_lora_rank is 20, .*; it takes a kv_lora_rank that 32 divides"),
    (dict(precision="int8", cache_format="int5"), "accepted for target cpu: float32, float16, fp8, int6, int6r, int4"),
])  # fmt: skip
def test_cache_formats_that_cannot_be_had(tmp_path, nothing_is_read, options, message):
    with pytest.raises(BuildError, match=message):
        build(checkpoints.write(tmp_path / "model"), tmp_path / "bundle", "cpu", **options)
