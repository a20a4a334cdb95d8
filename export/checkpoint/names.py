"""Names of tensors as training wrappers, older saves and transformers 5 write them, brought to the checkpoint's own."""

import re
from collections.abc import Iterable, Mapping

from latentrt.export.checkpoint.base import Part, Source, StoredTensor
from latentrt.export.errors import CheckpointError

# What wrappers put into names: DataParallel and DDP, torch.compile, FSDP, activation checkpointing, PEFT, DeepSpeed.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_model", "_forward_module",
             "base_layer"}  # fmt: skip
_BACKBONE, _HEADS = "model", ("lm_head",)
# Buffers and leftovers that no product reads: RoPE tables, masks, state of extensions, scales of KV caches.
_BUFFERS = re.compile(
    r".*(rotary_emb\.\w+|position_ids|masked_bias|attn\.bias|_extra_state|[kv]_scale|[kv]_cache_scale|[qkv]_proj\.output_scale)"
)
_STACKED = re.compile(r"(.*\.mlp\.experts)\.(gate_up|gate|up|down)_proj(?:\.weight)?")


def canonical(name: str) -> str:
    """`module.model.layers.0...`, `layers.0...` and `base_model.model.model.layers.0...` -> `model.layers.0...`."""
    pieces = [piece for piece in name.split(".") if piece not in _WRAPPERS]
    while len(pieces) > 1 and pieces[0] == _BACKBONE:
        pieces = pieces[1:]
    return ".".join(pieces if pieces[0] in _HEADS else [_BACKBONE, *pieces])


def is_wrapped(name: str) -> bool:
    """Whether a training wrapper put something into the name; transformers knows no such names."""
    return not _WRAPPERS.isdisjoint(name.split("."))


def canonical_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, str]:
    """{canonical name: stored name} of all that are no buffers. Raises CheckpointError where two names mean the same."""
    found: dict[str, str] = {}
    for name, tensor in stored.items():
        meant = canonical(name)
        if _BUFFERS.fullmatch(meant) or 0 in tensor.shape:  # transformers writes empty tensors for n_shared_experts 0
            continue
        if meant in found:
            raise CheckpointError(
                f"{tensor.file}: tensors {found[meant]} and {name} are both {meant}; "
                "two checkpoints are mixed in this folder, download it again into an empty one"
            )
        found[meant] = name
    return found


def stacked_experts(tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, Source], set[str]]:
    """Experts in one tensor [E, ...] a layer, as transformers 5 keeps them: a source per expert, and the stacked names.

    gate_up_proj [E, 2 * moe_intermediate_size, hidden_size] has the gate's rows above up's; down_proj
    [E, hidden_size, moe_intermediate_size].
    """
    sources: dict[str, Source] = {}
    explained: set[str] = set()
    for name, tensor in tensors.items():
        stacked = _STACKED.fullmatch(name)
        if stacked and len(tensor.shape) == 3:
            explained.add(name)
            for expert in range(tensor.shape[0]):
                sources |= _expert(f"{stacked[1]}.{expert}", stacked[2], name, expert, tensor.shape[1:])
    return sources, explained


def _expert(prefix: str, kind: str, name: str, expert: int, shape: tuple[int, ...]) -> dict[str, Source]:
    if kind != "gate_up":
        return {f"{prefix}.{kind}_proj.weight": plain(Part(name, expert), shape)}
    half = shape[0] // 2
    pieces = {"gate": (0, half), "up": (half, shape[0])}
    return {
        f"{prefix}.{which}_proj.weight": plain(Part(name, expert, rows), (rows[1] - rows[0], shape[1]))
        for which, rows in pieces.items()
    }


def plain(part: Part, shape: Iterable[int]) -> Source:
    """A weight that is stored as it is."""
    return Source(tuple(shape), (part,), lambda tensor: tensor)
