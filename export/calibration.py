"""Static scales of FP8 activations: one constant per linear, from the largest |input| over sample tokens.

The torch model runs over the checkpoint in float32, layer by layer: one layer's weights are loaded, all sample tokens go
through it, and only their hidden states stay. What is scaled is what `fp8_graph` quantizes of linears; the experts inside our
moe_experts keep one scale per token whatever was calibrated, those of a published checkpoint (`experts`) get constants as well.
Values beyond the largest one seen saturate at run time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from latentrt.export.checkpoint import Checkpoint
from latentrt.export.layerwise import one_sequence, run_layer, threads_for
from latentrt.export.models import registry
from latentrt.export.models.base import Config, Read, Weight, weight_name
from latentrt.export.quantization.fp8 import LARGEST, SMALLEST_ABSMAX
from latentrt.export.samples import Samples, Tokens
from latentrt.plugins.step_graph import ABSORBED, layer_prefix


def activation_scales(
    checkpoint: Checkpoint, samples: Samples, progress: Callable[[float], None] = lambda layers: None, experts: bool = False
) -> dict[str, float]:
    """Weight name of every linear -> scale of its input: largest |x| / 448. `progress` gets 1 per finished layer.

    experts: of the routed experts' weights too, one scale for all experts of a layer, as engines that fuse them need.
    """
    config, scales = checkpoint.config, {}
    weights = registry.of(config).weights(config)
    with torch.no_grad(), threads_for(config):
        states = _embed(checkpoint, weights, samples)
        for number in range(config.num_hidden_layers):
            prefix = layer_prefix(number)
            members = [w for w in weights if w.name.startswith(prefix)]
            layer = _load_layer(config, number, members, checkpoint.read)
            with _largest_inputs(layer, prefix, members) as largest, _ExpertInputs(members, largest if experts else {}):
                states = [(ids, run_layer(layer, ids, hidden, angles, config), angles) for ids, hidden, angles in states]
            del layer  # before the next one is loaded
            checkpoint.release()
            scales |= {name: max(value, SMALLEST_ABSMAX) / LARGEST for name, value in largest.items()}
            progress(1)
    return scales


def _embed(checkpoint: Checkpoint, weights: list[Weight], samples: Samples) -> list[tuple[Tokens, Tensor, list[Tensor]]]:
    """Tokens, hidden [T, hidden_size] and angles of every sequence, float32. The table is the checkpoint's tensor, mapped."""
    with torch.device("meta"):
        module = registry.of(checkpoint.config).embed(checkpoint.config)
    by_name = {w.name: w for w in weights}
    read = {n: by_name[weight_name(f"embed.{n}")].read(checkpoint.read) for n, _ in module.named_parameters()}
    module.load_state_dict(read, strict=False, assign=True)
    found = []
    for sequence in samples.sequences:
        hidden, *angles = module(one_sequence(sequence))
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


class _ExpertInputs(TorchDispatchMode):
    """Adds weight name of the layer's stacked experts -> largest |input| to `largest`, of all experts together."""

    def __init__(self, weights: list[Weight], largest: dict[str, float]):
        super().__init__()
        self._largest, self._names = largest, {w.role: w.name for w in weights if w.role in ("gate_up", "down")}
        largest |= dict.fromkeys(self._names.values(), 0.0)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if self._names and function is torch.ops.latentrt.moe_experts.default:
            rows, ids, _, gate_up = arguments[:4]
            for expert in ids.unique().tolist():
                mine = rows[(ids == expert).any(1)]
                gate, up = (mine @ gate_up[expert].t()).chunk(2, 1)
                self._note("gate_up", mine)
                self._note("down", F.silu(gate) * up)
        return function(*arguments, **(options or {}))

    def _note(self, role: str, inputs: Tensor) -> None:
        name = self._names[role]
        self._largest[name] = max(self._largest[name], float(inputs.abs().max()))
