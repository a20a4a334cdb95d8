"""One part of an engine as files for a bug report: a self-contained ONNX model, one step's inputs, and what should come out.

The part is what the comparison ran, or, where that holds own kernels and ONNX Runtime's show the same error, the same part of
the bundle's plain graph, which runs anywhere. Of a target for GPUs it is the ONNX graph with function bodies and casts, as
validation/stages/on_cpu.py makes them.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from latentrt.export.lowering.onnxruntime.native import CPU_DOMAIN
from latentrt.plugins.step_graph import LOGITS, updated
from latentrt.validation.bisect import reproduce, tensors
from latentrt.validation.bisect.case import Case
from latentrt.validation.bisect.diagnosis import Defect
from latentrt.validation.bisect.parts import EngineGraph, Part
from latentrt.validation.bisect.replay import capture
from latentrt.validation.bisect.runners import OnnxRuntimeRunner, Runner
from latentrt.validation.bisect.spread import Spread
from latentrt.validation.errors import ValidationError

PART, CELLS = "part.onnx", "written_cells"  # the second: an output, the cells that the step wrote [T, width]
LARGEST_FILE = 1 << 30  # bytes of an ONNX file; weights of larger parts lie beside it
_OF_THE_RUN = ("topk_weights",)  # right for the logits of the run that was judged, and for no other's
_CACHED = ("cached latent", "cached k_pe", tensors.END)


@dataclass
class Extraction:
    """Where a part goes: the one called `wanted`, or the first with a defect."""

    folder: Path
    wanted: str | None = None
    written: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ValidationError(f"{self.folder}: exists and is not an empty folder; give another one for --extract")

    def takes(self, part: str, defect: Defect | None) -> bool:
        """Whether this part is the one."""
        return not self.written and (part == self.wanted if self.wanted else defect is not None)

    def write(self, runner: Runner, case: Case, given: Mapping, spreads: Mapping[str, Spread], defect: Defect | None) -> None:
        """Writes a part that was judged. spreads: by tensor, of those that were looked at."""
        self.folder.mkdir(parents=True, exist_ok=True)
        step = _Step(runner, case, given, spreads, defect)
        plain = _plain(runner, case.part)
        for chosen, part in filter(None, (plain, (runner, case.part))):
            step.save(self.folder, chosen, part)
            if defect is None or self._shows(defect):
                break
        else:
            self.notes.append("this step on ONNX Runtime does not show the error: it is in what ran it, or needs earlier steps")
        if plain and (chosen, part) != plain:
            self.notes.append("own kernels alone show the error: ONNX Runtime's, in the bundle's plain graph, do not")
        shutil.copy(reproduce.__file__, self.folder / "reproduce.py")
        self._polygraphy(step)
        (self.folder / "README.md").write_text(_readme(step, defect, self.notes))
        self.written = sorted(self.folder.iterdir())

    def _shows(self, defect: Defect) -> bool:
        found = {tensor: (error, limit) for _, tensor, error, limit in reproduce.compare(self.folder)}
        if defect.tensor not in found:
            return True  # not a value of the graph: nothing that ONNX Runtime could be asked
        error, limit = found[defect.tensor]
        return not error <= limit

    def _polygraphy(self, step: "_Step") -> None:
        """The same in Polygraphy's own formats."""
        try:
            from polygraphy.comparator import IterationResult, RunResults
            from polygraphy.json import save_json
        except ImportError:
            self.notes.append('no files for Polygraphy: it is not installed; pip install "latentrt[polygraphy]"')
            return
        save_json([step.feeds], str(self.folder / "inputs.json"))
        for name, values in (("expected", step.expected), ("engine", step.outputs)):
            results = RunResults()
            results.append((name, [IterationResult(outputs=dict(values), runner_name=name, runtime=0.0)]))
            results.save(str(self.folder / f"{name}.json"))


class _Step:
    """The step of the script in which the defect's tensor is farthest off, with its inputs, outputs and expected outputs."""

    def __init__(self, runner: Runner, case: Case, given: Mapping, spreads: Mapping[str, Spread], defect: Defect | None):
        self.runner, self.case, self.spreads, self.defect = runner, case, spreads, defect
        self.number = _number(case, defect)
        self.step = case.s.script.steps[self.number]
        found = capture(runner, case.part, case.s.script, given, self.number)
        spec, before = runner.target.cache, found.before
        pages = {case.part.cache: before.reshape(-1, spec.page_size, spec.width)} if before is not None else {}
        self.feeds = {n: _numpy(v) for n, v in (dict(found.feeds) | pages).items()}
        self.outputs, self.expected, self.told = {}, {}, {}

    def save(self, folder: Path, runner: Runner, part: Part) -> None:
        """part.onnx, part.json and the npz files."""
        model = _model(runner, part, self.feeds)
        self._cells(model, part)
        self.own_kernels = any(n.domain == CPU_DOMAIN for n in model.graph.node)
        self._expect(part)
        _save(model, folder / PART)
        c = self.defect
        told = {
            "part": part.name, "defect": c and {"tensor": c.tensor, "place": c.place, "value": c.value, "node": c.node,
                                                "kind": c.hypothesis.kind, "words": c.hypothesis.words},
            "target": runner.target.precision, "cache": runner.target.cache.format, "rows": len(self.step.rows),
            "step": self.number, "own_kernels": self.own_kernels, "tensors": self.told,
        }  # fmt: skip
        (folder / "part.json").write_text(json.dumps(told, indent=1))
        np.savez(folder / "inputs.npz", **self.feeds)
        np.savez(folder / "expected.npz", **self.expected)
        self.outputs = reproduce.run(folder)
        _type_outputs(model, self.outputs, updated(part.cache or ""))
        onnx.save(model, str(folder / PART))
        np.savez(folder / "engine.npz", **self.outputs)

    def _expect(self, part: Part) -> None:
        exact, rows = self.case.exact, self.case.rows_of(self.step)
        self.expected, self.told = {}, {}
        wrong = self.defect and self.defect.tensor
        told = {tap for tap in self.spreads if tap not in _OF_THE_RUN} | {wrong}
        for tap, value in part.taps.items():
            if tap in exact and tap in told:
                self._tell(tap, value, _numpy(exact[tap][rows]))
        tap = wrong if wrong in _CACHED else _CACHED[0]
        if self.cells is not None and tap in told:
            both = torch.cat([exact["cached latent"], exact["cached k_pe"]], -1)
            self._tell(tap, CELLS, both[self.cells_of].float().numpy())

    def _tell(self, tap: str, value: str, expected: np.ndarray) -> None:
        """Of a choice of experts that is a defect no token may differ."""
        spread = self.spreads.get(tap)
        measure = _measure(spread) if spread and not spread.passes else "row"
        limit = getattr(spread.limit, measure) if spread else 0.0
        self.expected[value] = expected
        self.told[value] = {"tensor": tap, "measure": measure, "limit": limit}

    def _cells(self, model: onnx.ModelProto, part: Part) -> None:
        """An output more: what the step wrote to the cache, where its cells are plain numbers."""
        c, script = self.case.s.config, self.case.s.script
        self.cells = None
        is_plain = part.cache and self.runner.target.cache.width == c.kv_lora_rank + c.qk_rope_head_dim
        if not is_plain or self.case.s.numerics.cache.rotated:
            return
        in_the_end = self.defect is not None and self.defect.tensor == tensors.END
        self.cells_of = np.arange(script.first_row, len(script.tokens)) if in_the_end else self.step.rows
        self.cells = np.concatenate([script.cells(s) for s in script.sequences])[self.cells_of]
        graph = model.graph
        graph.initializer.append(numpy_helper.from_array(self.cells.astype(np.int64), f"{CELLS}.places"))
        graph.initializer.append(numpy_helper.from_array(np.array([-1, self.runner.target.cache.width]), f"{CELLS}.shape"))
        kept = updated(part.cache)
        graph.node.append(helper.make_node("Reshape", [kept, f"{CELLS}.shape"], [f"{CELLS}.all"]))
        graph.node.append(helper.make_node("Gather", [f"{CELLS}.all", f"{CELLS}.places"], [f"{CELLS}.stored"]))
        graph.node.append(helper.make_node("Cast", [f"{CELLS}.stored"], [CELLS], to=TensorProto.FLOAT))
        graph.output.append(helper.make_tensor_value_info(CELLS, TensorProto.FLOAT, None))


def _number(case: Case, defect: Defect | None) -> int:
    """The step with fewest rows where the tensor is beyond its limit, else where it is farthest off; without a tensor the step
    with most rows."""
    steps = case.s.script.steps
    sizes = [len(step.rows) for step in steps]
    if defect is None or (defect.tensor not in case.found and defect.tensor != tensors.END):
        return int(np.argmax(sizes))
    if defect.tensor == tensors.END:
        return len(steps) - 1
    if defect.spread and _measure(defect.spread) == "column":
        return int(np.argmax(sizes))
    exact, found = (_numpy(v[defect.tensor]) for v in (case.exact, case.found))
    rows = [case.rows_of(step) for step in steps]
    errors = [reproduce.error(exact[r], found[r], "row") if len(r) else -1.0 for r in rows]
    limit = max(defect.spread.limit.row, defect.spread.limit.whole) if defect.spread else 0.0
    beyond = [k for k, error in enumerate(errors) if not error <= 2 * limit]
    return min(beyond, key=lambda k: sizes[k]) if beyond else int(np.argmax(errors))


def _measure(spread: Spread) -> str:
    """Which error is farthest beyond its limit."""
    return max(("whole", "row", "column"), key=lambda k: getattr(spread.found, k) / (getattr(spread.limit, k) or 1e-300))


def _plain(runner: Runner, part: Part) -> tuple[Runner, Part] | None:
    """The same part of the graph without own kernels; None where the runner's has none."""
    if not isinstance(runner, OnnxRuntimeRunner) or not any(n.domain == CPU_DOMAIN for n in part.model.graph.node):
        return None
    plain = OnnxRuntimeRunner(runner.bundle, runner.target, runner.threads, own_kernels=False)
    graph = EngineGraph(plain.model, [i.name for i in runner.target.inputs])
    return plain, graph.part(part.name)


def _model(runner: Runner, part: Part, feeds: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """The part with its weights and typed inputs."""
    model = onnx.ModelProto()
    model.CopyFrom(part.model)
    for name, kind in part.given.items():
        model.graph.input.append(helper.make_tensor_value_info(name, kind, ["T", *feeds[name].shape[1:]]))
    return runner.with_weights(model)


def _type_outputs(model: onnx.ModelProto, values: Mapping[str, np.ndarray], cache: str) -> None:
    """Outputs with the types and sizes that they turned out to have; the first dimension is dynamic."""
    del model.graph.output[:]
    for name, value in values.items():
        rows = {cache: "num_pages", LOGITS: "N"}.get(name, "T")
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        model.graph.output.append(helper.make_tensor_value_info(name, kind, [rows, *value.shape[1:]]))


def _save(model: onnx.ModelProto, file: Path) -> None:
    """With large weights in a file beside it; the model in memory refers to that file then."""
    large = sum(len(t.raw_data) for t in model.graph.initializer) > LARGEST_FILE
    weights = f"{file.stem}.weights"
    if large:
        (file.parent / weights).unlink(missing_ok=True)  # else it would grow
    onnx.save(model, str(file), save_as_external_data=large, location=weights if large else None)


def _numpy(value) -> np.ndarray:
    """float32 or the integers that it has."""
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    return (value.float() if value.is_floating_point() and value.dtype != torch.float16 else value).cpu().numpy()


def _readme(step: _Step, defect: Defect | None, notes: list[str]) -> str:
    snr = " ".join(f"{n}:{-20 * np.log10(t['limit']):.1f}" for n, t in step.told.items() if t["limit"])
    words = [f"# {step.case.part.name}", ""]
    if defect:
        words += [f"{defect.place}: {defect.hypothesis.kind}: {defect.hypothesis.words}."]
        words += [f"Tensor {defect.tensor}, in the graph {defect.value}, node {defect.node}.", ""]
    words += [f"Step {step.number} of the comparison, {len(step.step.rows)} rows. `python reproduce.py` shows the errors.", ""]
    words += [
        "- part.onnx: the part with its weights; part.json: what its values are, and how far each may be off",
        "- inputs.npz, inputs.json (Polygraphy's): the step's inputs, the latent cache before it among them",
        "- expected.npz, expected.json: what the formulas over the checkpoint say, in float64",
        "- engine.npz, engine.json: what this part made of the inputs on ONNX Runtime, on the machine that wrote this", "",
    ]  # fmt: skip
    if step.own_kernels:
        words += ["part.onnx has own kernels: reproduce.py needs latentrt, and Polygraphy's --onnxrt cannot load it.", ""]
    else:
        words += ["The same with Polygraphy (signal to noise in decibels: 20 log10(1 / limit)):", "",
                  "    polygraphy run part.onnx --onnxrt --load-inputs inputs.json --load-outputs expected.json \\",
                  f"        --compare snr --snr-threshold {snr}", "",
                  "and reduced.onnx, which ends at the first wrong node:", "",
                  "    polygraphy debug reduce part.onnx -o reduced.onnx --mode bisect --no-reduce-inputs \\",
                  "        --load-inputs inputs.json --check python reproduce.py polygraphy_debug.onnx", ""]  # fmt: skip
    return "\n".join([*words, *(f"Note: {note}." for note in notes), ""])
