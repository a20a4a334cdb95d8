"""The weights that a bundle's engine computes with, decoded to float32 and named as a Hugging Face checkpoint names them.

Written as a checkpoint of its own, anyone can load them with transformers and check a quantized engine.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from latentrt.export import quantization
from latentrt.export.checkpoint import INDEX, TOKENIZER_FILES, Checkpoint
from latentrt.export.errors import ConfigError
from latentrt.export.models import registry
from latentrt.export.models.base import Config, Weight
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.errors import BundleError
from latentrt.validation.errors import ValidationError
from latentrt.validation.tokens import HELD_OUT

SHARD_BYTES = 1 << 30


class StoredWeights:
    """The weight set of one target, decoded one weight at a time. Raises BundleError or ValidationError."""

    def __init__(self, bundle: Bundle, target_name: str | None = None):
        _, target = bundle.target(target_name)
        weight_set = bundle.manifest.weight_sets[target.weight_set]
        try:
            self.format = quantization.restore(weight_set.format.model_dump())
        except ValueError as error:
            raise ValidationError(f"{bundle.path}: weight set {target.weight_set}: {error}; build the bundle again") from None
        config = bundle_config(bundle)
        self.family = registry.of(config)
        self.rotated = weight_set.rotated
        self.weights = self.family.weights(config, self.rotated)
        self.interleaved = weight_set.gate_up_layout == "interleaved"
        handles = [safe_open(bundle.file(ref), framework="pt") for ref in weight_set.files]
        self._where = {name: handle for handle in handles for name in list(handle.keys())}

    def decode(self, weight: Weight) -> torch.Tensor:
        """`weight` as the engine uses it, float32, in the step graph's shape: gate rows above up rows."""
        names = [weight.name + stored.suffix for stored in self.format.stored(weight)]
        missing = [name for name in names if name not in self._where]
        if missing:
            raise BundleError(f"the weight set lacks tensor {missing[0]}; the bundle is damaged, build it again")
        value = self.format.decode(weight, [self._where[name].get_tensor(name) for name in names])
        return torch.cat([value[:, 0::2], value[:, 1::2]], 1) if self.interleaved and weight.role == "gate_up" else value


def bundle_config(bundle: Bundle) -> Config:
    """The model configuration that the manifest carries. Raises BundleError."""
    try:
        return registry.find(bundle.manifest.family).restore(bundle.manifest.config)
    except ConfigError as error:
        raise BundleError(f"{bundle.path}: its model: {error}; build the bundle again") from None


def dequantized_state_dict(bundle: Bundle, target_name: str | None = None) -> dict[str, torch.Tensor]:
    """All weights of a target under their checkpoint names, float32. See `dequantized_tensors` where memory matters."""
    return dict(dequantized_tensors(bundle, target_name))


def dequantized_tensors(bundle: Bundle, target_name: str | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, float32 tensor) of every weight, one graph weight in memory at a time."""
    stored = StoredWeights(bundle, target_name)
    return stored.family.originals((weight, stored.decode(weight)) for weight in stored.weights)


def write_checkpoint(
    bundle: Bundle, target_name: str | None, reference: Path, out: Path, progress: Callable[[int], None] = lambda n: None
) -> int:
    """Writes the dequantized weights as a Hugging Face checkpoint in shards of about 1 GiB; returns the number of tensors.

    Config and tokenizer are those of the checkpoint `reference`. Raises ValidationError, ConfigError or BundleError.
    """
    source = Checkpoint(reference)
    raw = {k: v for k, v in source.raw.items() if k != "quantization_config"}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValidationError(f"{out}: is {'not empty' if out.is_dir() else 'a file'}; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in dequantized_tensors(bundle, target_name):
        if shard and size + tensor.nbytes > SHARD_BYTES:
            size = _write_shard(out, shard, weight_map)
        shard[name] = tensor
        size += tensor.nbytes
        progress(1)
    _write_shard(out, shard, weight_map)
    (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1))
    raw |= {"torch_dtype": "float32", "dtype": "float32", "tie_word_embeddings": False}
    (out / "config.json").write_text(json.dumps(raw, indent=2))
    for file in (file for pattern in (*TOKENIZER_FILES, HELD_OUT) for file in source.path.glob(pattern) if file.is_file()):
        (out / file.relative_to(source.path)).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, out / file.relative_to(source.path))
    return len(weight_map)


def _write_shard(out: Path, shard: dict[str, torch.Tensor], weight_map: dict[str, str]) -> int:
    """Writes and empties `shard`; returns the new shard's size, 0."""
    file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
    save_file(shard, out / file, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(shard, file)
    shard.clear()
    return 0
