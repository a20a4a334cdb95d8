"""Runs part.onnx on its saved inputs and compares what comes out with what the formulas say: python reproduce.py [MODEL.onnx]

Needs numpy and onnxruntime, and latentrt where part.json has "own_kernels". Exit status 1: a tensor is beyond its limit.
MODEL.onnx is a piece of part.onnx, as `polygraphy debug reduce` makes them: all of its values that have an expected one are
compared, inputs in its midst are the expected values, and a piece that cannot be run passes. That takes onnx, too.
"""

import json
import sys
from pathlib import Path

import numpy as np


def run(folder: Path, piece: str | None = None) -> dict[str, np.ndarray]:
    """Outputs of the part by name, or those of a piece of it that have expected values; none where it cannot be run."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    told = json.loads((folder / "part.json").read_text())
    if told["own_kernels"]:
        from latentrt.plugins.cpu import compile as own_kernels

        options.register_custom_ops_library(str(own_kernels.library()))
        options.add_session_config_entry("session.disable_prepacking", "1")
    model = _with_outputs(piece, folder / "part.onnx", told["tensors"]) if piece else str(folder / "part.onnx")
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no common base class for its errors
        if not piece:
            raise
        print(f"{piece}: ONNX Runtime cannot load it: {error}")
        return {}
    known = dict(np.load(folder / "inputs.npz"))
    if piece:
        known |= {n: v for n, v in np.load(folder / "expected.npz").items() if n not in known}
    names, given = [o.name for o in session.get_outputs()], [i.name for i in session.get_inputs()]
    if not set(given) <= set(known):
        return {}
    return dict(zip(names, session.run(names, {n: known[n] for n in given}), strict=True))


def _with_outputs(piece: str, whole: Path, names) -> bytes:
    """With the whole one's functions: ONNX-GraphSurgeon, which cuts for Polygraphy, drops outputs of nodes in them."""
    import onnx

    model, given = onnx.load(piece), onnx.load(str(whole), load_external_data=False)
    del model.functions[:]
    model.functions.extend(given.functions)
    made = {n for node in model.graph.node for n in node.output}
    kept = [o.name for o in model.graph.output if o.name in made] + [n for n in names if n in made]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in dict.fromkeys(kept))
    return model.SerializeToString()


def error(expected: np.ndarray, found: np.ndarray, measure: str) -> float:
    """Relative Euclidean error of the whole, or the largest of a row or column; of ids the share of rows with another set."""
    expected, found = (x.reshape(len(x), -1) for x in (expected, found))
    if expected.dtype.kind in "iu":
        return float((np.sort(expected, -1) != np.sort(found, -1)).any(-1).mean())
    exact = expected.astype(np.float64)
    difference = found.astype(np.float64) - exact
    if measure == "whole":
        value = np.linalg.norm(difference) / (np.linalg.norm(exact) + 1e-300)
    else:
        axis = 1 if measure == "row" else 0
        sizes = np.linalg.norm(exact, axis=axis)
        least = 0.1 * np.sqrt(np.mean(sizes**2)) or 1.0
        value = (np.linalg.norm(difference, axis=axis) / np.maximum(sizes, least)).max()
    return float(value) if np.isfinite(value) else np.inf


def compare(folder: Path, piece: str | None = None) -> list[tuple[str, str, float, float]]:
    """(name in the graph, what it is, error, limit) of every tensor with an expected value."""
    told, found = json.loads((folder / "part.json").read_text())["tensors"], run(folder, piece)
    with np.load(folder / "expected.npz") as expected:
        present = [(n, t) for n, t in told.items() if n in found]
        return [(n, t["tensor"], error(expected[n], found[n], t["measure"]), t["limit"]) for n, t in present]


def main(arguments: list[str]) -> int:
    beyond = False
    for name, tensor, found, limit in compare(Path(__file__).parent, *arguments[:1]):
        is_beyond = not found <= limit
        beyond |= is_beyond
        print(f"{tensor:26} error {found:8.2e}  limit {limit:8.2e}  {'BEYOND' if is_beyond else 'ok':6}  {name}")
    return int(beyond)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
