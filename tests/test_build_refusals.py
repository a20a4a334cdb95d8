"""What a build refuses before its first long step, and what it leaves alone."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from latentrt.export.checkpoint import Checkpoint
from latentrt.export.errors import BuildError
from latentrt.runtime.bundle import writer
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.errors import BundleError
from tests import checkpoints
from tests.builds import build

pytestmark = pytest.mark.usefixtures("fast_trace")


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
