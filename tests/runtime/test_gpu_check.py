"""The GPU script itself, tried on the CPU: tiny shapes, kernels in the interpreter, packages missing, crashes and kills."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"
CHEAP = ("attention", "routing", "experts", "fused", "sampling", "launch", "engines", "measure-attention", "measure-experts")
PREFIX = """
import os, runpy, sys, time
os.environ["TRITON_INTERPRET"] = "1"
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rsplit("/", 2)[0])
{}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
MISSING = PREFIX.format("""
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"cuda", "jinja2", "matplotlib", "ml_dtypes", "onnx", "onnx_ir", "onnxruntime", "onnxscript",
                                  "polygraphy", "pydantic", "rich", "safetensors", "tensorrt", "tensorrt_rtx", "tokenizers",
                                  "transformers", "typer"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])
sys.meta_path.insert(0, Missing())
""")


def run(folder: Path, *arguments: str, prefix=(), expected: int = 0) -> tuple[dict, str]:
    command = [sys.executable, *prefix, str(SCRIPT), *arguments, "--out", str(folder)]
    child = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert child.returncode == expected, child.stdout[-3000:] + child.stderr[-3000:]
    return results(folder)


def results(folder: Path) -> tuple[dict, str]:
    (result,) = folder.glob("*.json")
    (table,) = folder.glob("*.md")
    return json.loads(result.read_text()), table.read_text()


def sections(*names: str) -> list[str]:
    return [word for name in names for word in ("--section", name)]


def patched(statement: str) -> tuple[str, str]:
    """Runs the script with `e`, benchmarks.gpu.experts, patched; the routing section calls e.moe_route."""
    return "-c", PREFIX.format(f"import benchmarks.gpu.experts as e, benchmarks.gpu.watch as w\n{statement}")


def test_dry_run(tmp_path):
    result, table = run(tmp_path, "--dry-run", *sections(*CHEAP))
    assert result["checks"] > 30 and not result["failed"] and not result["unfinished"]
    assert {m["section"] for m in result["measurements"]} == {"ceilings", "measure-attention", "measure-experts"}
    skipped = {s["name"] for s in result["skipped"]}
    assert "engines" in skipped, "what needs a GPU is skipped by name"
    assert "| name |" in table and "## Skipped" in table
    timed = [m for m in result["measurements"] if m["section"] != "ceilings"]
    assert all(m["kernels"] == f"JIT {result['packages']['triton']}" and m["sets"] == 2 for m in timed)
    assert table.count(f"Triton {result['packages']['triton']}, PyTorch") == 3, "beside every table"


def test_with_torch_and_triton_alone(tmp_path):
    names = ("attention", "routing", "experts", "fused", "sampling", "launch", "probe", "example", "engines", "measure-model")
    result, _ = run(tmp_path, "--dry-run", *sections(*names), prefix=("-c", MISSING))
    why = {s["section"]: s["why"] for s in result["skipped"] if s["name"] == s["section"]}
    assert set(why) == {"sampling", "probe", "example", "engines", "measure-model"} and "not installed" in why["example"]
    assert not result["failed"] and {c["section"] for c in result["passed"]} == set(names) - set(why)


def test_failures_set_the_exit_status(tmp_path):
    """No time at all: every section is skipped, and that is no failure; a broken one is."""
    result, _ = run(tmp_path / "a", "--dry-run", "--minutes", "0", *sections("routing"))
    assert result["checks"] == 0 and result["skipped"][0]["why"] == "the section's time is spent"
    prefix = patched("e.moe_route = lambda *a, **k: 1 / 0")
    result, table = run(tmp_path / "b", "--dry-run", *sections("routing", "fused"), prefix=prefix, expected=1)
    assert [c["section"] for c in result["failed"]] == ["routing"] and "ZeroDivisionError" in table
    assert {c["section"] for c in result["passed"]} == {"fused"}, "the other sections go on"


def test_a_section_that_takes_the_process_down(tmp_path):
    prefix = patched("e.moe_route = lambda *a, **k: os.abort()")
    result, table = run(tmp_path, "--dry-run", *sections("ceilings", "routing", "fused"), prefix=prefix, expected=1)
    assert [(c["section"], c["note"]) for c in result["failed"]] == [("routing", "died: SIGABRT")] and "FAILED routing" in table
    assert {c["section"] for c in result["passed"]} == {"fused"} and result["measurements"] and not result["unfinished"]


@pytest.mark.parametrize(
    ("end", "why"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "died: SIGKILL"),
        (lambda: os._exit(7), "exit status 7"),
        (lambda: time.sleep(600), "killed 0 s after its time was spent"),
    ],
)
def test_the_others_run_in_another_process(tmp_path, monkeypatch, end, why):
    from benchmarks.gpu import watch
    from benchmarks.gpu.state import State

    file, reports = tmp_path / "state.json", []
    monkeypatch.setattr(watch, "GRACE", 0.0)

    def work(left):
        for name in left:
            state = State.read(file)
            state.section, state.deadline = name, time.monotonic() + 0.5
            state.write(file)
            if name == "b":
                end()
            state.measurements.append(dict(section=name, process=os.getpid()))
            state.seconds[name] = 0.1
            state.write(file)
        return 0

    assert watch.watch(["a", "b", "c"], work, file, reports.append) == 0
    state = reports[-1]
    assert list(state.seconds) == ["a", "b", "c"] and [m["section"] for m in state.measurements] == ["a", "c"]
    assert len({m["process"] for m in state.measurements}) == 2
    assert [(c["section"], c["note"]) for c in state.checks] == [("b", why)]


def test_a_process_that_says_so_is_followed_by_another(tmp_path):
    """After an illegal access nothing runs in the same process; a machine without a GPU needs no second try."""
    from benchmarks.gpu import watch
    from benchmarks.gpu.state import State

    file = tmp_path / "state.json"

    def one(left):
        state = State.read(file)
        state.seconds[left[0]] = 0.0
        state.write(file)
        return watch.AFRESH

    assert watch.watch(["a", "b"], one, file, lambda state: None) == 0 and list(State.read(file).seconds) == ["a", "b"]
    assert watch.watch(["c"], lambda left: watch.NO_GPU, file, lambda state: None) == watch.NO_GPU


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_what_was_found_is_kept_when_the_command_is_killed(tmp_path, sent):
    prefix = patched(f"open({str(tmp_path / 'pid')!r}, 'w'); e.moe_route = lambda *a, **k: time.sleep(600)")
    command = [sys.executable, *prefix, str(SCRIPT), "--dry-run", *sections("ceilings", "routing"), "--out", str(tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (list(tmp_path.glob("*.md")) and "ceilings" in results(tmp_path)[0]["seconds"]):
        assert child.poll() is None
        time.sleep(0.2)
    child.send_signal(sent)
    assert child.wait() == (143 if sent == signal.SIGTERM else -signal.SIGKILL)
    result, table = results(tmp_path)
    assert result["measurements"][0]["section"] == "ceilings" and result["unfinished"] == ["routing"]
    assert "NOT FINISHED: routing" in table


def test_earlier_sections_leave_time_for_later_ones():
    from benchmarks.gpu_check import MINUTES, SECTIONS, deadline

    assert sum(kept for _, _, kept in SECTIONS.values()) <= 60 * MINUTES
    names, now = list(SECTIONS), time.monotonic()
    assert deadline(names, "attention", now + 540, 9) - now == pytest.approx(70, abs=1), "kept for it, the ceilings and nobody"
    assert deadline(names, "measure-model", now + 100, 9) - now == pytest.approx(100, abs=1)
    assert deadline(["fused"], "fused", now + 540, 9) - now == pytest.approx(SECTIONS["fused"][1], abs=1)


def test_near_ties_are_no_mismatch():
    import torch

    from benchmarks.gpu.experts import _wrong_ids

    logits = torch.tensor([[1.0, 1.0 + 1e-7, 0.0], [1.0, 1.0, 0.0], [2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    expected = torch.tensor([[1], [0], [0], [-1]], dtype=torch.int32)
    for row, wrong in ((0, 0), (1, 1)):  # nearly equal; equal, where the lower id comes first
        ids = expected.clone()
        ids[row] = 1 - ids[row]
        assert _wrong_ids(logits, "softmax", ids, expected) == _wrong_ids(logits, "sigmoid", ids, expected) == wrong
    assert _wrong_ids(logits, "softmax", torch.tensor([[1], [0], [1], [0]]), expected) == 2


def test_every_set_of_a_measurement_has_other_experts():
    import torch

    from benchmarks.gpu import experts
    from benchmarks.gpu.run import Run

    gpu = Run(torch.device("cpu"), True)
    gpu.sets = lambda read: 5
    sets = experts._input_sets(gpu, 1, 8, 64, 6, 100)
    chosen = [set(ids.flatten().tolist()) for _, ids, _ in sets]
    assert all(len(c) == 6 for c in chosen) and len(set().union(*chosen)) == 30


@pytest.mark.parametrize(("name", "precision"), [("v2_lite", "bf16"), pytest.param("v2", "fp8", marks=pytest.mark.deep)])
def test_groups_that_layers_imply(name, precision):
    import torch

    from benchmarks.gpu import model, model_speed
    from latentrt.export.models.deepseek_v2.config import parse
    from latentrt.runtime.backends.torch.graph import StepProgram

    raw = json.loads((SCRIPT.parents[1] / "tests" / "configs" / f"{name}.json").read_text())
    config = parse(raw | {"num_hidden_layers": 2})
    for form, node in (("absorbed", "MlaAttention"), ("expanded", "MlaPrefill")):
        graph, gpu = model.graphs(config, precision)[form], Found()
        weights = {n: torch.empty(size, dtype=dtype, device="meta") for n, (size, dtype) in model_speed.declared(graph).items()}
        model.check_groups(gpu, "whole", StepProgram(graph, weights, "cpu", "reference"), config, precision)
        model.check_groups(gpu, "none", StepProgram(graph, weights, "cpu", "reference", fuse=False), config, precision)
        whole, none = gpu.checks
        assert whole[1] == 0 and none[1] > 9 and "SumNorm 0" in none[3] and f"{node} 2" in none[3]


class Found:
    """Takes a Run's checks."""

    def __init__(self):
        self.checks = []

    def check(self, *arguments):
        self.checks.append(arguments)


def test_kernels_of_another_triton_are_found_and_launched(tmp_path, monkeypatch):
    import torch

    from benchmarks.gpu import ahead, launch
    from benchmarks.gpu.run import Run
    from latentrt.plugins.architecture import Gpu
    from latentrt.plugins.launch import compile as kernels
    from latentrt.plugins.launch.cuda import CudaLauncher

    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path))
    ahead.find.cache_clear()
    gpu = Run(torch.device("cpu"), True)
    driver = launch._StandIn()
    ready = ahead.Ahead(gpu, CudaLauncher(Gpu.of(90), {}, driver))
    tensors = launch.attention.batch(gpu, [1, 1], [64, 65], 16, torch.bfloat16, rank=64, rope=16)
    assert ready.calls("mla_attention", [tensors], launch.ATTENTION) is None and "JIT" in gpu.skipped[0]["why"]

    _, _, plan = launch.outputs_and_plan("mla_attention", tensors, launch.ATTENTION, Gpu.of(90))
    (tmp_path / "kernels").mkdir()
    common = dict(architecture=90, shared_bytes=1 << 16, num_warps=4, num_ctas=1)
    common |= dict(global_scratch_bytes=0, profile_scratch_bytes=0)
    for spec in plan.kernels:
        for triton in ("3.5.0", "3.10.1"):
            name = f"{spec.op}.{spec.function}.sm90.{kernels.digest(spec, 90, triton)}"
            (tmp_path / "kernels" / f"{name}.cubin").write_bytes(b"code")
            (tmp_path / "kernels" / f"{name}.json").write_text(json.dumps(common | dict(name=spec.function, triton=triton)))
    ahead.find.cache_clear()
    call, words = ready.calls("mla_attention", [tensors, tensors], launch.ATTENTION)
    assert words == "cubin 3.10.1", "the newest"
    call()
    assert driver.launched == 2 * len(plan.launches)


def test_without_a_gpu(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    child = subprocess.run([sys.executable, str(SCRIPT), "--out", str(tmp_path)], capture_output=True, text=True)
    assert child.returncode == 2 and "--dry-run" in child.stderr and not list(tmp_path.iterdir())
