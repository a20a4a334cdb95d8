"""latentrt build: exit codes, what it refuses, interruption and death at any point, and that errors leave nothing behind."""

import contextlib
import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest

from latentrt import cli
from latentrt.export import weight_set
from latentrt.export.checkpoint import Checkpoint, combined_digest
from latentrt.export.errors import BuildError, CheckpointError
from latentrt.export.models import registry
from latentrt.runtime import smoke_test
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.bundle.writer import open_writer
from latentrt.runtime.errors import BundleError
from tests import checkpoints
from tests.builds import build
from tests.conftest import TINY

pytestmark = pytest.mark.usefixtures("fast_trace")
ROOT = Path(__file__).parents[1]
SMOKE_TEST = smoke_test.run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("build"), seed=1, **TINY)


@pytest.fixture(autouse=True)
def no_smoke_test(monkeypatch):
    """Loading the engine takes most of a build's time, and is no part of what these tests are about."""
    monkeypatch.setattr(smoke_test, "run", lambda bundle, name: None)


def command(*arguments) -> tuple[int, str]:
    """Exit code and standard output of the command line, without a process of its own."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = cli.main(["build", *map(str, arguments)])
    return code, out.getvalue()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_json_and_up_to_date(checkpoint, tmp_path):
    out = tmp_path / "bundle"
    code, text = command(checkpoint, "--out", out, "--precision", "fp32", "--json")
    summary = json.loads(text)
    assert code == 0 and summary["built"] and (summary["target"], summary["precision"]) == ("cpu", "fp32")
    assert summary["bytes"] == sum(p.stat().st_size for p in (out / "files").iterdir())
    before = snapshot(out)
    code, text = command(checkpoint, "--out", out, "--precision", "fp32", "--json")
    assert code == 0 and not json.loads(text)["built"] and snapshot(out) == before
    assert Bundle(out).verify() == []
    code, text = command(checkpoint, "--out", out, "--precision", "fp32")
    assert code == 0 and "up to date" in text


def test_a_bundle_that_is_there_is_kept_without_force(checkpoint, tmp_path):
    out = tmp_path / "bundle"
    assert command(checkpoint, "--out", out, "--precision", "fp32", "--json")[0] == 0
    before = snapshot(out)
    code, text = command(checkpoint, "--out", out, "--precision", "int8", "--json")
    assert code == 2 and "--force" in json.loads(text)["error"] and snapshot(out) == before
    other = checkpoints.write(tmp_path / "other", seed=2, **TINY)
    code, text = command(other, "--out", out, "--precision", "fp32", "--json")
    assert code == 2 and "another checkpoint" in json.loads(text)["error"] and snapshot(out) == before
    assert command(other, "--out", out, "--precision", "int8", "--force", "--json")[0] == 0
    assert Bundle(out).manifest.checkpoint.digest != json.loads(before["manifest.json"])["checkpoint"]["digest"]
    assert Bundle(out).verify() == [] and len(snapshot(out)) == 1 + len(set(Bundle(out).manifest.refs()))


@pytest.mark.parametrize(("arguments", "words"), [
    (("--target", "sm999"), ["sm999", "accepted", "cpu"]), (("--precision", "fp4"), ["fp4", "accepted", "int8", "fp32"]),
    (("--precision", "fp8"), ["fp8", "cpu"]), (("--accuracy", "wild", "--precision", "int8"), ["wild", "exact", "fast"]),
    (("--cache-format", "int3"), ["int3", "float32", "float16"]), (("--max-context", "0"), ["max_context is 0", "256"]),
    (("--max-context", "257"), ["257", "1 to 256"]),
    (("--accuracy", "wild", "--precision", "fp32"), ["accuracy is 'wild', accepted: fast, exact"]),
    (("--weights", "heavy"), ["weights is 'heavy', accepted: inputs, embedded"]),
    (("--activations", "wild"), ["activations is 'wild', accepted: dynamic, static"]),
    (("--weights", "embedded"), ["weights is 'embedded', but only GPU targets", "target cpu is built in int8", "leave it out"]),
])  # fmt: skip
def test_unknown_choices(checkpoint, tmp_path, capsys, arguments, words):
    code, text = command(checkpoint, "--out", tmp_path / "bundle", "--json", *arguments)
    error = json.loads(text)
    assert code == 2 and error["kind"] == "BuildError" and not (tmp_path / "bundle").exists()
    for word in words:
        assert word in error["error"]


def test_a_folder_that_is_no_bundle_is_left_alone(checkpoint, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for extra in ((), ("--force",)):
        code, text = command(checkpoint, "--out", tmp_path, "--json", *extra)
        assert code == 2 and "thesis.txt" in json.loads(text)["error"]
        assert snapshot(tmp_path) == {"thesis.txt": b"years of work"} and not (tmp_path / "files").exists()
    code, text = command(checkpoint, "--out", tmp_path / "thesis.txt", "--json")
    assert code == 2 and "is a file" in json.loads(text)["error"] and (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.slow
def test_two_builds_at_once(checkpoint, tmp_path):
    out = tmp_path / "bundle"
    with open_writer(out):
        code, text = command(checkpoint, "--out", out, "--json")
        assert code == 2 and "another build" in json.loads(text)["error"]
    assert command(checkpoint, "--out", out, "--precision", "fp32", "--json")[0] == 0


@pytest.mark.parametrize(("arguments", "words"), [
    ((), "not a folder"), (("--max-context", "9999"), "max_context"), (("--out", "{file}"), "is a file"),
    (("--calibration", "{file}"), "calibration"), (("--precision", "int8"), "already"),
])  # fmt: skip
def test_no_progress_before_what_can_be_known_at_once(tiny_checkpoint, tiny_bundle, tmp_path, capsys, arguments, words):
    (tmp_path / "file").write_text("")
    checkpoint = tiny_checkpoint if arguments else tmp_path / "missing"
    arguments = [a.format(file=tmp_path / "file") for a in arguments]
    out = [] if "--out" in arguments else ["--out", str(tiny_bundle)]
    assert cli.main(["build", str(checkpoint), "--precision", "fp32", *out, *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.startswith("error: ") and said.count("\n") == 1, said


def test_a_damaged_tokenizer_is_named_before_anything_is_made(tiny_checkpoint, tmp_path):
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    (checkpoint / "tokenizer.json").write_text("{")
    code, text = command(checkpoint, "--out", tmp_path / "bundle", "--json")
    assert code == 2 and json.loads(text)["error"].startswith(str(checkpoint / "tokenizer.json"))
    assert not (tmp_path / "bundle").exists()


class Process:
    """tests/build_lock.py in a process of its own; `at` is where it last said that it is."""

    def __init__(self, folder: Path, role: str):
        command = [sys.executable, "-m", "tests.build_lock", str(folder), role]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.at = self.child.stdout.readline().strip()

    def go_on(self) -> str:
        self.child.stdin.write("\n")
        self.child.stdin.flush()
        self.at = self.child.stdout.readline().strip()
        return self.at


@pytest.fixture
def process(tmp_path):
    started = []
    yield lambda role: started.append(Process(tmp_path / "bundle", role)) or started[-1]
    for process in started:
        process.child.communicate("\n" * 100)


def test_a_lock_that_was_removed_locks_nobody_out_of_nothing(process):
    """Three at once: the second has opened the first one's lock file, which goes before it locks; the third is in."""
    first, late = process("enter"), process("late")
    assert (first.at, late.at) == ("in", "opened")
    assert first.go_on() == "whole" and first.go_on() == ""
    third = process("enter")
    assert third.at == "in" and late.go_on() == "opened"  # again: the new file
    assert late.go_on() == "refused" and third.go_on() == "whole"


@pytest.mark.slow
def test_a_build_that_leaves_takes_nothing_from_one_that_enters(process):
    leaving = process("leave")
    entering = process("enter")
    while entering.at == "refused" and leaving.at == "?":
        leaving.go_on()
        entering = process("enter")
    assert entering.at == "in" and leaving.at == "?"  # it came in before the other had removed everything
    while leaving.at == "?":
        leaving.go_on()
    assert entering.go_on() == "whole" and process("enter").at == "refused"


@pytest.mark.slow
def test_real_command_line(tmp_path):
    """As a user starts it: the error goes to standard error in one line, the exit code is 2, no traceback."""
    child = subprocess.run(
        [sys.executable, "build.py", tmp_path / "nothing", "--out", tmp_path / "out"], capture_output=True, text=True, cwd=ROOT
    )
    assert child.returncode == 2 and not (tmp_path / "out").exists()
    assert "nothing: not a folder" in child.stderr and "Traceback" not in child.stderr and child.stdout == ""


def poison(folder: Path) -> str:
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    checkpoints.edit_tensors(folder, lambda t: t[name].__setitem__((2, 3), float("nan")))
    return name


def test_an_error_leaves_nothing_behind(checkpoint, tmp_path):
    damaged, out = checkpoints.write(tmp_path / "damaged", seed=1, **TINY), tmp_path / "bundle"
    name = poison(damaged)
    with pytest.raises(CheckpointError, match=name):
        build(damaged, out, "cpu", "fp32")
    assert not out.exists()
    build(checkpoint, out, "cpu", "fp32")
    before = snapshot(out)
    with pytest.raises(CheckpointError, match=name):
        build(damaged, out, "cpu", "int8", force=True)
    assert snapshot(out) == before


def test_a_damaged_manifest_is_replaced_with_force_only(checkpoint, tmp_path):
    out = tmp_path / "bundle"
    build(checkpoint, out, "cpu", "fp32")
    (out / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="manifest"):
        build(checkpoint, out, "cpu", "fp32")
    assert (out / "manifest.json").read_text() == "{"
    build(checkpoint, out, "cpu", "fp32", force=True)
    assert Bundle(out).verify() == []


@pytest.mark.parametrize("there_before", [False, True])
def test_an_interrupted_build_resumes_after_its_finished_shards(checkpoint, tmp_path, monkeypatch, there_before):
    """Ctrl-C in the third of five shards: the next build fills that one and the last two only."""
    out, filled, real = tmp_path / "bundle", [], weight_set._fill
    if there_before:
        build(checkpoint, out, "cpu", "fp32")
        before = snapshot(out)

    def fill(path, *args, **kwargs):
        filled.append(path)
        if len(filled) == 3:
            path.write_bytes(b"half a shard")
            raise KeyboardInterrupt
        real(path, *args, **kwargs)

    monkeypatch.setattr(weight_set, "_fill", fill)
    monkeypatch.setattr(weight_set, "PARTS_AT_ONCE", 1)
    code, _ = command(checkpoint, "--out", out, "--precision", "int8", "--force", "--json")
    assert code == 130 and len(filled) == 3
    if there_before:
        assert before.items() <= snapshot(out).items() and Bundle(out).verify() == []
    code, _ = command(checkpoint, "--out", out, "--precision", "int8", "--force", "--json")
    assert code == 0 and len(filled) == 6  # the third again, and the last two
    assert Bundle(out).verify() == [] and len(snapshot(out)) == 1 + len(set(Bundle(out).manifest.refs()))
    fresh = tmp_path / "fresh"
    build(checkpoint, fresh, "cpu", "int8")
    assert sorted(os.listdir(fresh / "files")) == sorted(os.listdir(out / "files"))  # content-named: the same bytes


@pytest.mark.parametrize("in_place", [False, True], ids=["another folder", "the same files, edited"])
def test_an_interrupted_shard_of_another_checkpoint_is_not_taken(checkpoint, tmp_path, monkeypatch, in_place):
    out, filled, real = tmp_path / "bundle", [], weight_set._fill
    checkpoint = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))

    def fill(path, *args, **kwargs):
        filled.append(path)
        if len(filled) == 3:
            raise KeyboardInterrupt
        real(path, *args, **kwargs)

    monkeypatch.setattr(weight_set, "_fill", fill)
    monkeypatch.setattr(weight_set, "PARTS_AT_ONCE", 1)
    assert command(checkpoint, "--out", out, "--precision", "fp32", "--json")[0] == 130
    if in_place:  # of the same size; the embedding is in the first shard, which is finished
        other = checkpoints.edit_tensors(checkpoint, lambda t: t["model.embed_tokens.weight"].mul_(2))
    else:
        other = checkpoints.write(tmp_path / "other", seed=7, **TINY)
    assert command(other, "--out", out, "--precision", "fp32", "--json")[0] == 0
    assert Bundle(out).manifest.checkpoint.digest == combined_digest(Checkpoint(other).file_digests())
    fresh = tmp_path / "fresh"
    build(other, fresh, "cpu", "fp32")
    assert sorted(os.listdir(fresh / "files")) == sorted(os.listdir(out / "files"))


@pytest.mark.parametrize("shards", [0, 2])
def test_a_full_disk_keeps_what_is_finished(checkpoint, tmp_path, monkeypatch, shards):
    """The disk fills up while the shard after `shards` finished ones is written; with space again the rest follows."""
    out, filled, real = tmp_path / "bundle", [], weight_set._fill

    def fill(path, *args, **kwargs):
        filled.append(path)
        if len(filled) == shards + 1:
            path.write_bytes(b"half a shard")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, *args, **kwargs)

    monkeypatch.setattr(weight_set, "_fill", fill)
    monkeypatch.setattr(weight_set, "PARTS_AT_ONCE", 1)
    code, text = command(checkpoint, "--out", out, "--precision", "int8", "--json")
    error = json.loads(text)["error"]
    assert code == 2 and error.startswith(f"{out}: no space left") and "\n" not in error
    if not shards:  # nothing to resume from, so nothing stays
        assert not out.exists()
        return
    assert "resumes" in error and not list(out.rglob("draft*")) and len(list((out / "files").iterdir())) == shards
    assert command(checkpoint, "--out", out, "--precision", "int8", "--json")[0] == 0
    assert len(filled) == 6 and Bundle(out).verify() == []  # the third again, and the last two
    assert len(snapshot(out)) == 1 + len(set(Bundle(out).manifest.refs()))


@pytest.mark.slow
def test_killed_anywhere(checkpoint, traced, tmp_path):
    """kill -9 before every rename and removal of a build that replaces fp32 by int8, and at some writes of slabs: a reader sees
    the old bundle until the manifest's rename and the new one from then on, and the next build makes the new one, of the same
    bytes (files are named by content), and leaves no garbage."""
    graph = tmp_path / "graph.onnx"
    graph.write_bytes(ir.to_proto(traced(registry.load(checkpoint))).SerializeToString())
    child = subprocess.run(
        [sys.executable, "-m", "tests.killed_builds", checkpoint, graph, tmp_path], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    every = [json.loads(line) for line in child.stdout.splitlines()]
    writes, points = ([p for p in every if (p["at"] == "pwrite") == amid] for amid in (True, False))
    assert len(writes) > 5 and {(p["code"], p["reads"]) for p in writes} == {(-9, "fp32")}
    # 4 shards and 4 journals, graph, tokenizer file, manifest; then the removal of old files
    assert len(points) > 12 and [p["code"] for p in points] == [-9] * (len(points) - 1) + [0]
    reads = [p["reads"] for p in points]
    assert set(reads) == {"fp32", "int8"} and reads == sorted(reads)  # old, ..., old, new, ..., new
    assert all(p["next"] and p["clean"] for p in every), [p for p in every if not (p["next"] and p["clean"])]
    assert any(p["garbage"] for p in points)  # there was something to clean up


def test_a_checkpoint_whose_logits_overflow_is_not_committed(tmp_path, monkeypatch):
    """Finite weights, infinite logits: the first step finds out, and nothing is left."""
    monkeypatch.setattr(smoke_test, "run", SMOKE_TEST)
    huge, out = checkpoints.write(tmp_path / "huge", seed=1, **TINY), tmp_path / "bundle"
    checkpoints.edit_tensors(huge, lambda t: (t["lm_head.weight"].fill_(3e38), t["model.norm.weight"].fill_(1e3)))
    with pytest.raises((BuildError, BundleError), match="not finite"):
        build(huge, out, "cpu", "fp32")
    assert not out.exists()


@pytest.mark.slow
def test_a_damaged_bundle_is_mended_by_building_again(tiny_checkpoint, tiny_bundle, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    shard = max(bundle.glob("files/*.safetensors"), key=lambda f: f.stat().st_size)
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    assert build(tiny_checkpoint, bundle, "cpu", "fp32")["built"]
    assert Bundle(bundle).verify() == []
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert Bundle(bundle).verify() != []
    assert build(tiny_checkpoint, bundle, "cpu", "fp32", force=True)["built"]
    assert Bundle(bundle).verify() == []


@pytest.mark.slow
def test_a_build_that_is_up_to_date_does_without_transformers(tiny_checkpoint, tiny_bundle):
    """Importing it takes seconds."""
    code = "import sys; from latentrt import cli; print(cli.main(sys.argv[1:]), 'transformers' in sys.modules)"
    command = [sys.executable, "-c", code, "build", str(tiny_checkpoint), "--out", str(tiny_bundle), "--precision", "fp32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 False", done.stdout + done.stderr


def test_another_tokenizer_is_another_target(tiny_checkpoint, tiny_bundle, tmp_path):
    bundle, checkpoint = tmp_path / "bundle", tmp_path / "checkpoint"
    shutil.copytree(tiny_bundle, bundle)
    shutil.copytree(tiny_checkpoint, checkpoint)
    assert not build(checkpoint, bundle, "cpu", "fp32")["built"]
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert build(checkpoint, bundle, "cpu", "fp32")["built"]
    (checkpoint / "generation_config.json").write_text("{bad")
    with pytest.raises(CheckpointError, match="generation_config"):
        build(checkpoint, bundle, "cpu", "fp32")
    assert Bundle(bundle).verify() == []


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_is_one_line(tiny_checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "build.py", str(tiny_checkpoint), "--out", str(tmp_path / "file" / "bundle"), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert str(tmp_path / "file") in json.loads(done.stdout)["error"]


def test_absurd_counts_are_refused_at_once(tiny_checkpoint, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(CheckpointError, match="num_hidden_layers 1000000000, but there are only"):
        build(checkpoint, tmp_path / "bundle", "cpu", "fp32")
