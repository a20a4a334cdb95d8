"""The weights that a bundle's engine computes with, decoded to float32 and named as a Hugging Face checkpoint names them.

    python -m validation.dequantize BUNDLE --reference CHECKPOINT --out DIR

writes them as a checkpoint of its own, so that anyone can load it with transformers and check a quantized engine.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from safetensors import safe_open
from safetensors.torch import save_file

from export.config import DeepseekV2Config
from export.lowering import onnxruntime as cpu
from export.models import deepseek_v2
from export.models.weights import Weight
from export.quantization import BFloat16, Fp8, WeightFormat
from runtime.bundle import Bundle, BundleError
from validation.errors import ValidationError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
                   "chat_template.jinja", "held_out.txt")  # fmt: skip
LAYOUTS = (cpu.LAYOUT, "step_graph")  # rows of gate and up in turn, or gate above up
_GPU_FORMATS = {"bf16": BFloat16, "fp8": Fp8}
SHARD_BYTES = 1 << 30
INDEX = "model.safetensors.index.json"


class StoredWeights:
    """The weight set of one target, decoded one weight at a time. Raises BundleError or ValidationError."""

    def __init__(self, bundle: Bundle, target_name: str | None = None):
        _, target = bundle.target(target_name)
        weight_set = bundle.manifest.weight_sets[target.weight_set]
        if weight_set.layout not in LAYOUTS:
            known = ", ".join(map(repr, LAYOUTS))
            raise ValidationError(f"weight set {target.weight_set}: layout {weight_set.layout!r}, known: {known}")
        self.config = bundle_config(bundle)
        self.format = _format(self.config, target)
        self.weights = deepseek_v2.weights(self.config)
        self.interleaved = weight_set.layout == cpu.LAYOUT
        self._handles = [safe_open(bundle.file(ref), framework="pt") for ref in weight_set.files]
        self._where = {name: handle for handle in self._handles for name in list(handle.keys())}

    def decode(self, weight: Weight) -> torch.Tensor:
        """`weight` as the engine uses it, float32, in the step graph's shape: gate rows above up rows."""
        suffixes = [stored.suffix for stored in self.format.stored(weight)]
        missing = [weight.name + s for s in suffixes if weight.name + s not in self._where]
        if missing:
            raise BundleError(f"the weight set lacks tensor {missing[0]}; the bundle is damaged, build it again")
        value = self.format.decode(weight, [self._where[weight.name + s].get_tensor(weight.name + s) for s in suffixes])
        return torch.cat([value[:, 0::2], value[:, 1::2]], 1) if self.interleaved and weight.role == "gate_up" else value

    def is_quantized(self, weight: Weight) -> bool:
        return getattr(self.format, "is_quantized", lambda w: False)(weight)


def bundle_config(bundle: Bundle) -> DeepseekV2Config:
    """The model configuration that the manifest carries."""
    return DeepseekV2Config.model_validate(bundle.manifest.config)


def dequantized_state_dict(bundle: Bundle, target_name: str | None = None) -> dict[str, torch.Tensor]:
    """All weights of a target under their checkpoint names, float32. See `dequantized_tensors` where memory matters."""
    return dict(dequantized_tensors(bundle, target_name))


def dequantized_tensors(bundle: Bundle, target_name: str | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, float32 tensor) of every weight, one graph weight in memory at a time.

    kv_b_proj is put together from w_uk and w_uv, stacked experts are taken apart into gate_proj, up_proj and down_proj.
    lm_head is always given, since a tied one may be stored quantized.
    """
    stored = StoredWeights(bundle, target_name)
    pending: dict[str, torch.Tensor] = {}
    for weight in stored.weights:
        value = stored.decode(weight)
        if weight.role == "absorbed":
            pending[weight.name.rsplit(".", 1)[1]] = value
            if len(pending) == 2:
                yield weight.sources[0][0], _kv_b(pending.pop("w_uk"), pending.pop("w_uv"))
        elif weight.role == "gate_up":
            for expert, (gate, up) in enumerate(weight.sources):
                for name, rows in zip((gate, up), value[expert].chunk(2), strict=True):
                    yield name, rows.contiguous()
        elif weight.role == "down":
            for expert, (down,) in enumerate(weight.sources):
                yield down, value[expert].contiguous()
        else:
            yield weight.name, value.contiguous()


def _kv_b(w_uk: torch.Tensor, w_uv: torch.Tensor) -> torch.Tensor:
    """w_uk [H, nope, rank] and w_uv [H, rank, v] -> kv_b_proj.weight [H * (nope + v), rank]."""
    return torch.cat([w_uk, w_uv.transpose(1, 2)], 1).flatten(0, 1).contiguous()


def _format(config: DeepseekV2Config, target) -> WeightFormat:
    """The weight format that a target was built with; its key must be the weight set's."""
    if target.precision in _GPU_FORMATS:
        weight_format = _GPU_FORMATS[target.precision]()
    else:
        options = cpu.CpuOptions(target.precision, str(target.options.get("accuracy", "fast")), target.cache.format)
        weight_format = cpu.weight_format(config, options)
    if not target.weight_set.startswith(f"{weight_format.key}."):
        raise ValidationError(
            f"weight set {target.weight_set!r} does not fit format {weight_format.key!r} here; build the bundle again"
        )
    return weight_format


def write_checkpoint(
    bundle: Bundle, target_name: str | None, reference: Path, out: Path, progress: Callable[[int], None] = lambda n: None
) -> int:
    """Writes the dequantized weights as a Hugging Face checkpoint in shards of about 1 GiB; returns the number of tensors."""
    if out.exists() and any(out.iterdir()):
        raise ValidationError(f"{out}: is not empty; give another folder")
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
    _copy_config(reference, out)
    return len(weight_map)


def _write_shard(out: Path, shard: dict[str, torch.Tensor], weight_map: dict[str, str]) -> int:
    """Writes and empties `shard`; returns the new shard's size, 0."""
    file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
    save_file(shard, out / file, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(shard, file)
    shard.clear()
    return 0


def _copy_config(reference: Path, out: Path) -> None:
    raw = json.loads((reference / "config.json").read_text(encoding="utf-8"))
    raw |= {"torch_dtype": "float32", "dtype": "float32", "tie_word_embeddings": False}
    (out / "config.json").write_text(json.dumps(raw, indent=2))
    for name in TOKENIZER_FILES:
        if (reference / name).is_file():
            shutil.copyfile(reference / name, out / name)


def main(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    reference: Annotated[Path, typer.Option(help="Checkpoint that the bundle was built from: config and tokenizer.")],
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint.")],
    target: Annotated[str | None, typer.Option(help="Target of the bundle; the only one by default.")] = None,
) -> None:
    """Writes the weights that an engine computes with as a float32 Hugging Face checkpoint."""
    try:
        count = write_checkpoint(Bundle(bundle), target, reference, out)
    except (ValidationError, ValueError, OSError) as error:
        Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    print(f"{out}: {count} tensors, float32")


if __name__ == "__main__":
    typer.run(main)
