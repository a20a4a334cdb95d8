"""Static scales of FP8 activations: one constant per linear, from the largest |input| over sample tokens.

The torch model runs over the checkpoint in float32, layer by layer: one layer's weights are loaded, all sample tokens go
through it, and only their hidden states stay. What is scaled is what `fp8_graph` quantizes of linears; the experts inside
moe_experts keep one scale per token whatever was calibrated. Values beyond the largest one seen saturate at run time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from latentrt.export.checkpoint import Checkpoint
from latentrt.export.models import registry
from latentrt.export.models.base import Config, Read, Weight, page_shape, weight_name
from latentrt.export.quantization.fp8 import LARGEST, SMALLEST_ABSMAX
from latentrt.export.samples import Samples, Tokens
from latentrt.plugins.step_graph import ABSORBED, StepBatch, layer_prefix

_PAGE, _CHUNK = 64, 256  # the cache's page; rows at once, which bounds the attention scores [rows, heads, tokens]
_WIDE = 1024  # hidden_size from which threads help; at 192, two were 7 to 20 times slower than one on two shared cores


def activation_scales(
    checkpoint: Checkpoint, samples: Samples, progress: Callable[[float], None] = lambda layers: None
) -> dict[str, float]:
    """Weight name of every linear -> scale of its input: largest |x| / 448. `progress` gets 1 per finished layer."""
    config, scales = checkpoint.config, {}
    weights = registry.of(config).weights(config)
    with torch.no_grad(), _threads_for(config):
        states = _embed(checkpoint, weights, samples)
        for number in range(config.num_hidden_layers):
            prefix = layer_prefix(number)
            members = [w for w in weights if w.name.startswith(prefix)]
            layer = _load_layer(config, number, members, checkpoint.read)
            with _largest_inputs(layer, prefix, members) as largest:
                states = [(tokens, _run(layer, tokens, hidden, angles, config), angles) for tokens, hidden, angles in states]
            del layer  # before the next one is loaded
            checkpoint.release()
            scales |= {name: max(value, SMALLEST_ABSMAX) / LARGEST for name, value in largest.items()}
            progress(1)
    return scales


@contextmanager
def _threads_for(config: Config) -> Iterator[None]:
    """One thread where products are so small that several only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if config.hidden_size < _WIDE else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _embed(checkpoint: Checkpoint, weights: list[Weight], samples: Samples) -> list[tuple[Tokens, Tensor, list[Tensor]]]:
    """Tokens, hidden [T, hidden_size] and angles of every sequence, float32. The table is the checkpoint's tensor, mapped."""
    with torch.device("meta"):
        module = registry.of(checkpoint.config).embed(checkpoint.config)
    by_name = {w.name: w for w in weights}
    read = {n: by_name[weight_name(f"embed.{n}")].read(checkpoint.read) for n, _ in module.named_parameters()}
    module.load_state_dict(read, strict=False, assign=True)
    found = []
    for sequence in samples.sequences:
        hidden, *angles = module(_batch(sequence))
        found.append((sequence, hidden.float(), angles))
    return found


def _load_layer(config: Config, number: int, weights: list[Weight], read: Read) -> nn.Module:
    """The layer in float32, filled slab by slab: memory holds the layer and one tensor of the checkpoint."""
    family = registry.of(config)
    with torch.device("meta"):
        layer = family.layer(config, family.layer_kind(config, number), "float32", ABSORBED)
    layer.to_empty(device="cpu")
    parameters = dict(layer.named_parameters())
    for weight in weights:
        parameter, start = parameters.pop(weight.name.removeprefix(layer_prefix(number))), 0
        for slab in weight.slabs(read):
            parameter[start : start + len(slab)].copy_(slab)
            start += len(slab)
        assert start == len(parameter), weight.name
    assert not parameters, f"no weight for {sorted(parameters)}"
    return layer


@contextmanager
def _largest_inputs(layer: nn.Module, prefix: str, weights: list[Weight]) -> Iterator[dict[str, float]]:
    """Weight name of every linear of the layer -> largest |input| so far, while the context lasts."""
    largest = {w.name: 0.0 for w in weights if w.role == "linear"}

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            largest[name] = max(largest[name], float(inputs[0].abs().max()))

        return hook

    linears = {n: layer.get_submodule(n.removeprefix(prefix).removesuffix(".weight")) for n in largest}
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in linears.items()]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


def _run(layer: nn.Module, tokens: Tokens, hidden: Tensor, angles: list[Tensor], config: Config) -> Tensor:
    """One whole sequence through the layer, [T, hidden_size] -> the same, in chunks over a cache of its own."""
    cache, parts = torch.zeros(-(-len(tokens) // _PAGE), *page_shape(config, "float32", _PAGE)), []
    for start in range(0, len(tokens), _CHUNK):
        rows = slice(start, start + _CHUNK)
        part, cache, *_ = layer(hidden[rows], *(a[rows] for a in angles), cache, _batch(tokens[rows], start))
        parts.append(part)
    return torch.cat(parts)


def _batch(tokens: Tokens, cached: int = 0) -> dict[str, Tensor]:
    """The step of one sequence that has `cached` tokens in the cache, on pages 0, 1, ...; no row gets logits."""
    count = len(tokens)
    step = StepBatch(
        input_ids=np.array(tokens), positions=cached + np.arange(count), query_starts=np.array([0, count]),
        cached_lengths=np.array([cached]), block_table=np.arange(-(-(cached + count) // _PAGE))[None],
        num_tokens=np.array([count]), logit_rows=np.array([]),
    )  # fmt: skip
    return {name: torch.from_numpy(value.astype(np.int32)) for name, value in vars(step).items()}
