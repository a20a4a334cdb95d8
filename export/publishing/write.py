"""Writing a quantized checkpoint, one shard per layer: interrupted, the same call goes on after the last whole shard."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from latentrt.export.calibration import activation_scales
from latentrt.export.checkpoint import INDEX, Checkpoint, combined_digest
from latentrt.export.errors import BuildError
from latentrt.export.models.base import Weight
from latentrt.export.publishing.base import Published
from latentrt.export.recipe import Recipe
from latentrt.export.samples import Samples

MARKER = ".export.json"  # of a folder that is being written: what it is made of
INPUT_SCALES = ".input_scales.json"  # what calibration found, in such a folder
_QUANTIZED = ("linear", "gate_up", "down")  # roles; embedding, norms, router, kv_b_proj and head stay bfloat16


def plan(checkpoint: Checkpoint, published: Published, recipe: Recipe | None = None) -> tuple[dict[str, bool], list[str]]:
    """Tensor of the checkpoint -> whether it is quantized, and the modules that are not. BuildError for a recipe's faults."""
    weights = checkpoint.weights()
    kept = set(recipe.modules(weights, ["fp8"])["fp8"]) if recipe else set()
    shapes, quantized = checkpoint.expected_tensors(), {}
    for weight in weights:
        for name in (name for group in weight.sources for name in group):
            asked = weight.role in _QUANTIZED and weight.module not in kept
            quantized[name] = asked and not published.refusal(shapes[name])
    plain = dict.fromkeys(_module(name) for name, done in quantized.items() if not done and len(shapes[name]) == 2)
    return quantized, list(plain)


def check(published: Published, calibration: object | None) -> None:
    """BuildError unless sample tokens are given where the format needs them, and only there."""
    if published.calibrated and calibration is None:
        raise BuildError(f"format {published.name} scales inputs by constants: give sample tokens, --calibration TEXT")
    if calibration is not None and not published.calibrated:
        raise BuildError(f"format {published.name} has no scales of inputs; leave --calibration out")


def write(
    checkpoint: Checkpoint, published: Published, out: Path, recipe: Recipe | None = None,
    progress: Callable[[int], None] = lambda tensors: None, samples: Samples | None = None,
) -> int:  # fmt: skip
    """Writes the checkpoint in a format to the folder `out`; returns the number of stored tensors.

    `progress` is told how many tensors of the original are done; calibration counts as one a layer. BuildError if `out` holds
    something else, or `samples` do not fit the format.
    """
    check(published, samples)
    quantized, plain = plan(checkpoint, published, recipe)
    identity = {"format": published.name, "plain": plain, "checkpoint": combined_digest(checkpoint.file_digests())}
    _claim(out, identity | ({"calibration": samples.digest} if samples else {}))
    inputs = _input_scales(checkpoint, out, samples, progress) if samples else {}
    weight_map: dict[str, str] = {}
    for part, names in _parts(checkpoint.weights()).items():
        file = f"model-{part}.safetensors"
        if not (out / file).exists():
            stored = {k: v for name in names for k, v in _stored(checkpoint, published, name, quantized[name], inputs).items()}
            save_file(stored, out / f"{file}.new", metadata={"format": "pt"})
            os.replace(out / f"{file}.new", out / file)
            checkpoint.release()
        weight_map |= dict.fromkeys(_names(out / file), file)
        progress(len(names))
    _finish(checkpoint, published, out, plain, weight_map)
    return len(weight_map)


def _stored(
    checkpoint: Checkpoint, published: Published, name: str, quantized: bool, inputs: dict[str, float]
) -> dict[str, torch.Tensor]:
    value = checkpoint.read(name)
    if not quantized:
        return {name: value.bfloat16().contiguous()}
    stored = published.encode(value.float())
    if published.calibrated:
        stored["input_scale"] = torch.tensor(inputs[name])
    return {f"{_module(name)}.{key}": tensor for key, tensor in stored.items()}


def _input_scales(checkpoint: Checkpoint, out: Path, samples: Samples, progress: Callable[[int], None]) -> dict[str, float]:
    """Tensor of the checkpoint -> scale of its input; kept in `out` while that is not whole."""
    file = out / INPUT_SCALES
    if not file.exists():
        scales = activation_scales(checkpoint, samples, progress, experts=True)
        file.with_suffix(".new").write_text(json.dumps(scales))
        os.replace(file.with_suffix(".new"), file)
    scales = json.loads(file.read_text())
    sources = ((w.name, name) for w in checkpoint.weights() if w.name in scales for group in w.sources for name in group)
    return {name: scales[weight] for weight, name in sources}


def _claim(out: Path, identity: dict) -> None:
    """The folder, empty or begun by the same call."""
    marker = out / MARKER
    if marker.is_file() and json.loads(marker.read_text()) == identity:
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        found = "holds an export of something else" if marker.is_file() else "is not empty" if out.is_dir() else "is a file"
        raise BuildError(f"{out}: {found}; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(identity))


def _parts(weights: Iterable[Weight]) -> dict[str, list[str]]:
    """Tensors by shard: a layer each, and what is around the layers."""
    found: dict[str, dict[str, None]] = {}
    for weight in weights:
        pieces = weight.name.split(".")
        part = f"layer-{int(pieces[2]):03d}" if pieces[1] == "layers" else "ends"
        found.setdefault(part, {}).update(dict.fromkeys(name for group in weight.sources for name in group))
    return {part: list(names) for part, names in found.items()}


def _finish(checkpoint: Checkpoint, published: Published, out: Path, plain: list[str], weight_map: dict[str, str]) -> None:
    """Configurations and tokenizer; then the folder is whole."""
    raw = {k: v for k, v in checkpoint.raw.items() if k != "quantization_config"}
    raw |= {"torch_dtype": "bfloat16", "dtype": "bfloat16", "tie_word_embeddings": False}
    files = {"config.json": raw | {"quantization_config": published.quantization_config(plain)},
             INDEX: {"metadata": {}, "weight_map": weight_map}} | published.files(plain)  # fmt: skip
    with checkpoint.text_folder() as folder:
        for file in (f for f in Path(folder).rglob("*") if f.is_file() and f.suffix in (".json", ".jinja", ".model", ".txt")):
            if file.name not in (*files, INDEX) and "safetensors" not in file.name:
                target = out / file.relative_to(folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2))
    (out / INPUT_SCALES).unlink(missing_ok=True)
    (out / MARKER).unlink()


def _names(file: Path) -> list[str]:
    with safe_open(str(file), framework="pt") as opened:
        return list(opened.keys())


def _module(name: str) -> str:
    return name.removesuffix(".weight")
