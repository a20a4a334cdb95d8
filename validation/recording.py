"""A recorded run: what an engine made of some tokens, in a small file that can be judged on another machine.

A safetensors file; its metadata has one JSON object under "latentrt.recorded". W windows of T tokens in all, one after another:

    lengths               [W]        tokens of each window
    tokens                [T]
    MODE.ids              [T', k]    the likeliest next tokens after each, in MODE prefill (all windows), chunked and decode
    MODE.logprobs         [T', k]    (the first windows); natural logarithms of probabilities
    MODE.following        [T' - W']  of the tokens that do come next
    routing.L.ids         [R, top_k] experts of layer L, of the first R tokens of window 0
    routing.L.logits      [R, E]     the router's logits
    layer.L.NAME          [R, s]     what attention, mlp (added to the residual) and hidden (the layer's output) are, multiplied
                                     with s random vectors (`sketch`): differences of sketches are as long as differences,
                                     within a few per cent over all rows
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from latentrt.validation.errors import ValidationError
from latentrt.validation.reference.model import Trace
from latentrt.validation.sources.base import Rows
from latentrt.validation.tokens import Tokens

KEY, VERSION, SUFFIX = "latentrt.recorded", 1, ".safetensors"
LIKELIEST = 32  # tokens of a row
TRACED = 256  # tokens whose layers and routing are recorded
SKETCH = 16  # numbers of a row's sketch
LAYER_VALUES = ("attention", "mlp", "hidden")


@dataclass(frozen=True)
class Recording:
    """A file's content. modes: rows of each window by mode. facts: the JSON object."""

    path: str
    facts: dict
    tokens: Tokens
    modes: dict[str, list[Rows]]
    layers: list[dict[str, np.ndarray]]  # of each layer the sketches of LAYER_VALUES
    routing: dict[int, tuple[np.ndarray, np.ndarray]]  # layer -> ids, logits
    traced: int


def sketch(values: np.ndarray, seed: int) -> np.ndarray:
    """values [T, D] times D random vectors [s], so that lengths are kept on average: [T, s] float32."""
    vectors = np.random.default_rng(seed).standard_normal((values.shape[-1], SKETCH)) / np.sqrt(SKETCH)
    return (values.astype(np.float64) @ vectors).astype(np.float32)


def check(path: Path) -> None:
    """Refuses at once what could not be written in the end. ValidationError."""
    if path.suffix != SUFFIX:
        raise ValidationError(f"{path}: a recorded run is a {SUFFIX} file; give a name that ends so")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValidationError(f"{path}: {'is a folder' if path.is_dir() else 'its folder is missing'}; give a file to write")


def write(path: Path, facts: dict, tokens: Tokens, modes: dict[str, list[Rows]], trace: Trace | None) -> None:
    """Writes a file, whole or not at all. `trace`: of the first tokens of window 0, if the engine can be looked into."""
    tensors = {"lengths": np.array(list(map(len, tokens.windows)), np.int32), "tokens": np.concatenate(tokens.windows)}
    for mode, rows in modes.items():
        small = [row.likeliest(LIKELIEST) for row in rows]
        tensors[f"{mode}.ids"] = np.concatenate([r.ids for r in small]).astype(np.int32)
        tensors[f"{mode}.logprobs"] = np.concatenate([r.logprobs for r in small]).astype(np.float32)
        tensors[f"{mode}.following"] = np.concatenate([r.following for r in small]).astype(np.float32)
    if trace:
        for index in range(len(trace.hidden)):
            values = {name: getattr(trace, name)[index] for name in LAYER_VALUES}
            tensors |= {f"layer.{index}.{name}": sketch(value, index) for name, value in values.items()}
        for index, routing in trace.routing.items():
            tensors[f"routing.{index}.ids"] = routing.ids.astype(np.int16)
            tensors[f"routing.{index}.logits"] = routing.router_logits.astype(np.float32)
    facts = facts | {"version": VERSION, "text": {"source": tokens.source, "is_text": tokens.is_text}}
    tensors["tokens"] = tensors["tokens"].astype(np.int32)
    draft = path.with_name(f".{path.name}.draft")
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, draft, metadata={KEY: json.dumps(facts)})
    draft.replace(path)


def read(path: Path) -> Recording:
    """Opens a file. ValidationError if it is none, or another version's."""
    try:
        with safe_open(path, framework="np") as file:
            known = (file.metadata() or {}).get(KEY)
            if known is None:
                raise ValidationError(f"{path}: is no recorded run; make one with latentrt record")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ValidationError(f"{path}: cannot be read as a recorded run ({error}); make one with latentrt record") from None
    facts = json.loads(known)
    if facts.get("version") != VERSION:
        raise ValidationError(f"{path}: is version {facts.get('version')}, this version reads {VERSION}; record it again")
    lengths = tensors["lengths"]
    windows = np.split(tensors["tokens"].astype(np.int64), np.cumsum(lengths)[:-1])
    names = sorted({name.split(".")[0] for name in tensors if name.endswith(".logprobs")})
    layers = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("layer.")})
    routed = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("routing.")})
    return Recording(
        str(path), facts, Tokens(windows, facts["text"]["source"], facts["text"]["is_text"]),
        {mode: _rows(tensors, mode, lengths) for mode in names},
        [{name: tensors[f"layer.{k}.{name}"] for name in LAYER_VALUES} for k in layers],
        {k: (tensors[f"routing.{k}.ids"].astype(np.int32), tensors[f"routing.{k}.logits"]) for k in routed},
        len(tensors["layer.0.hidden"]) if layers else 0,
    )  # fmt: skip


def _rows(tensors: dict[str, np.ndarray], mode: str, lengths: np.ndarray) -> list[Rows]:
    ids, logprobs = (tensors[f"{mode}.{name}"] for name in ("ids", "logprobs"))
    following, found, start = tensors[f"{mode}.following"].astype(np.float64), [], 0
    for length in map(int, lengths):
        if start == len(ids):  # a mode of the first windows
            break
        part, ends = slice(start, start + length), slice(start - len(found), start - len(found) + length - 1)
        found.append(Rows(logprobs[part].astype(np.float64), following[ends], ids[part].astype(np.int64)))
        start += length
    return found
