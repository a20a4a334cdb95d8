"""Where a tensor of the checkpoint lies inside transformers' module, whichever way that version keeps its experts."""

import re
from collections.abc import Callable, Iterable

import torch

from latentrt.validation.errors import ReferenceRefused

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def parameter_view(parameters: dict[str, torch.Tensor], name: str) -> torch.Tensor | None:
    """The part of `parameters` (dict(model.named_parameters())) that checkpoint tensor `name` fills; None if there is none.

    transformers 5 stacks experts: gate_up_proj [E, 2 * moe_intermediate_size, hidden_size], gate above up, and down_proj.
    """
    if name in parameters:
        return parameters[name].data
    expert = _EXPERT.fullmatch(name)
    if not expert:
        return None
    experts, index, kind = expert[1], int(expert[2]), expert[3]
    stacked = parameters.get(f"{experts}.down_proj" if kind == "down" else f"{experts}.gate_up_proj")
    if stacked is None or index >= stacked.shape[0]:
        return None
    if kind == "down":
        return stacked.data[index]
    half = stacked.shape[1] // 2
    return stacked.data[index, :half] if kind == "gate" else stacked.data[index, half:]


def fill(model: torch.nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copies checkpoint tensors (name, tensor) into the module, in float32, and checks that nothing is left unfilled."""
    _untie(model)
    parameters = dict(model.named_parameters())
    filled = 0
    for name, tensor in tensors:
        view = parameter_view(parameters, name)
        if view is None or view.shape != tensor.shape:
            found = None if view is None else list(view.shape)
            raise ReferenceRefused(f"transformers has no place for {name} {list(tensor.shape)} (found {found})")
        view.copy_(tensor.float())
        filled += tensor.numel()
    total = sum(p.numel() for p in parameters.values())
    if filled != total:
        raise ReferenceRefused(f"transformers' module has {total} parameters, only {filled} were given")


def differing(model: torch.nn.Module, names: Iterable[str], read: Callable[[str], torch.Tensor]) -> list[str]:
    """Names of checkpoint tensors that the loaded module does not hold bit by bit (in float32)."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wrong = []
    for name in names:
        view = parameter_view(parameters, name)
        if view is None or not torch.equal(view, read(name).float()):
            wrong.append(name)
    return wrong


def _untie(model: torch.nn.Module) -> None:
    """lm_head gets a tensor of its own: a quantized head beside a plain embedding cannot share one."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
