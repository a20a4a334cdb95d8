"""Bundles for GPUs with both step graphs on the torch backend, on the CPU: which form runs, what it answers, what it holds."""

from pathlib import Path

import numpy as np
import pytest

from latentrt.runtime import backends
from latentrt.runtime.backends.base import SequenceRows, pack
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.errors import BundleError
from tests import ragged
from tests.runtime.test_torch_backend import LENGTHS, SCHEDULE, sequences, step_of

pytestmark = pytest.mark.slow

FORMS = ("absorbed", "expanded")


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint, traced, tmp_path_factory) -> Bundle:
    """`tiny_checkpoint` as a build makes it for sm86 (bf16) and sm89 (fp8); plans and kernels are nothing real."""
    from latentrt.export.lowering.tensorrt import gpu_kernels
    from latentrt.export.lowering.tensorrt import package as tensorrt_package

    def plan(job, folder, progress):
        Path(job.plan).write_text(f"plan {job.compute_capability} {folder.name}")
        Path(job.network).write_text("[]")

    out = tmp_path_factory.mktemp("expanded") / "bundle"
    with traced.remembered() as patch:
        patch.setattr(tensorrt_package, "require", lambda module, target: "1.7.1.116")
        patch.setattr(tensorrt_package, "run", plan)
        patch.setattr(gpu_kernels, "needed", lambda graph, capability: [])
        patch.setattr(gpu_kernels, "check", lambda *shapes: None)
        traced.build_once("tiny.gpu", tiny_checkpoint, out, "sm86,sm89")
    return Bundle(out)


def load(bundle: Bundle, target: str, prefill: str = "auto"):
    return backends.load(bundle, target, backend="torch", device="cpu", cache_tokens=704, prefill=prefill)


@pytest.fixture(scope="module")
def expected(tiny_bundle) -> np.ndarray:
    """Logits of all sequences in float32."""
    backend = backends.load(Bundle(tiny_bundle), "cpu", cache_tokens=1024)
    return np.concatenate(ragged.run(ragged.engine_step(backend), sequences(320), SCHEDULE, ragged.Pages(LENGTHS, 64)))


def runs_of(backend) -> list[str]:
    """Grows by the form of every step from now on."""
    found, runner = [], backend.runner
    for form, program in runner.programs.items():
        def run(inputs, form=form, real=program.run):
            found.append(form)
            return real(inputs)

        program.run = run
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("target", "limit"), [("sm86", 0.03), ("sm89", 0.2)])
def test_both_forms_answer_alike(bundle, expected, target, limit, form):
    """A forced form runs every step: chunks, chunks that continue a prefix, decode steps, a mixture."""
    backend = load(bundle, target, form)
    forms = runs_of(backend)
    found = np.concatenate(ragged.run(step_of(backend), sequences(320), SCHEDULE, ragged.Pages(LENGTHS, 64), padding=(0, 3)))
    assert set(forms) == {form}
    # the limits of tests/runtime/test_torch_backend.py: bfloat16's and e4m3's own
    assert np.median(np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)) <= limit


def test_operations_decide(bundle):
    backend = load(bundle, "sm86")
    forms, table = runs_of(backend), np.arange(1, 9).reshape(2, 4)
    for new, past in (([60, 3], [0, 0]), ([1, 1], [60, 3]), ([60, 1], [61, 4]), ([1, 0], [121, 5])):
        rows = [SequenceRows(range(n), p, [n - 1] if n else []) for n, p in zip(new, past, strict=True)]
        backend.step(pack(rows, table))
    assert forms == ["expanded", "absorbed", "expanded", "absorbed"]


@pytest.mark.parametrize("target", ["sm86", "sm89"])
def test_weights_are_in_memory_once(bundle, target):
    """Merged products and whatever else follows from weights alone are the same tensors in both programs."""
    backend = load(bundle, target)
    absorbed, expanded = backend.runner.programs.values()
    held = [
        {v.data_ptr(): v.nbytes for v in program._template if v is not None and v.nbytes > 4096}
        for program in (absorbed, expanded)
    ]
    assert held[1].keys() <= held[0].keys() and sum(held[0].values()) > 0
    stacked = absorbed._slots.keys() & expanded._slots.keys()
    assert any("+" in name for name in stacked), "products were merged"


def test_info_tells_of_both_engines(bundle, tiny_bundle):
    from rich.console import Console

    from latentrt.commands.console import info_table

    for opened, words in ((bundle, "absorbed (16 B), expanded (16 B)"), (Bundle(tiny_bundle), "absorbed (")):
        console = Console(width=200)
        with console.capture() as capture:
            console.print(info_table(opened))
        (line, *_) = [line for line in capture.get().splitlines() if line.startswith("│ engines")]
        assert words in line


def test_chunks_on_the_cpu_stay_small(bundle):
    assert load(bundle, "sm86").prefill_chunk == 256


def test_the_expanded_engines_files_are_checked(bundle, tmp_path):
    import shutil

    copy = Bundle(shutil.copytree(bundle.path, tmp_path / "bundle"))
    path = copy.file(copy.manifest.targets["sm86"].engines["expanded"].onnx)
    path.write_bytes(path.read_bytes()[:-1])
    assert any(path.name in finding for finding in copy.verify())
    with pytest.raises(BundleError, match=f"{path.name}: has"):
        copy.target("sm86")


def test_a_cpu_target_has_one_form(tiny_bundle):
    opened = Bundle(tiny_bundle)
    assert backends.load(opened, "cpu", cache_tokens=64, prefill="absorbed").prefill_chunk == 256
    for backend in (None, "torch"):
        with pytest.raises(BundleError, match="target cpu: prefill is 'expanded', but it has no expanded engine"):
            backends.load(opened, "cpu", backend=backend, cache_tokens=64, prefill="expanded")
