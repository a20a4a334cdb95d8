"""What a model family gives to the rooms that know none: its config, its weights, and the modules that are traced."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

Read = Callable[[str], "Tensor"]
Note = Callable[[str], None]  # takes words for the user


@dataclass(frozen=True)
class Weight:
    """One weight of the graph.

    `sources` groups checkpoint names: each group makes one slab along axis 0 through `make`, so that stacked experts
    are read expert by expert. `role` says what quantization may do with it:
    embedding, norm, bias, router, linear and head [out, in], absorbed [heads, in, out], gate_up and down [experts, out, in].
    `stored`: (inputs that share a scale, bits) where a checkpoint has all of it as such integers. `computed`: `make` computes
    values, where others only put them elsewhere, so that a checkpoint's integers cannot be kept.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    sources: tuple[tuple[str, ...], ...]
    make: Callable[..., Tensor] | None = None
    stored: tuple[int, int] | None = None
    computed: bool = False

    @property
    def module(self) -> str:
        """The checkpoint's module that this is a weight of; all routed experts of a layer are one, `<layer>.mlp.experts`."""
        return self.name.rpartition(".")[0]

    def slabs(self, read: Read) -> Iterator[Tensor]:
        """The tensor's slabs along axis 0, in order, in the checkpoint's dtype; `read` gives a checkpoint tensor."""
        return (self.slab(read, index) for index in range(len(self.sources)))

    def slab(self, read: Read, index: int) -> Tensor:
        """The slab that the `index`-th group makes."""
        tensors = [read(name) for name in self.sources[index]]
        return self.make(*tensors) if self.make else tensors[0]

    def read(self, read: Read) -> Tensor:
        """The whole tensor, perhaps the very one that `read` gave. Prefer `slabs` where memory matters."""
        import torch

        slabs = list(self.slabs(read))
        return slabs[0] if len(slabs) == 1 else torch.cat(slabs)


class Config(Protocol):
    """What every family's config has. It is a frozen pydantic model; its fields have the names of config.json."""

    model_type: ClassVar[str]
    model_fields: ClassVar[dict[str, Any]]
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    kv_lora_rank: int
    qk_rope_head_dim: int


@dataclass(frozen=True)
class Family:
    """One model family: a row of `registry`.

    The modules' `batch` has the step's inputs by name, see plugins/step_graph.py; T rows, of which N get logits.
    `layer` makes one of (config, kind, cache_format, form, ranks=1). Layers of one kind differ in weights only, and are traced
    once.
    `step` makes the whole step of (config, cache_format="float32", form=ABSORBED): its parts are `embed`, `layers` and
    `head`, and `load_weights(read)` fills it. A layer has `self_attn` and `mlp`, and `mlp.route`, the op, where there is
    routing. Buffers must be made on the CPU, whatever the device: they become constants of the graph.
    """

    model_type: str  # of config.json
    architectures: str  # how entries of config.json's architectures begin
    parse: Callable[[dict, Note], Config]  # config.json -> config; ConfigError names the field, found, accepted
    restore: Callable[[dict], Config]  # the same from a config's own model_dump, as a manifest has it
    counts: Callable[[Config], dict[str, int]]  # fields that say of how many things a checkpoint has at least a tensor each
    sizes: Callable[[Config], dict[str, tuple[str, int]]]  # field -> (tensor, axis) of the checkpoint that has this size
    weights: Callable[..., list[Weight]]  # (config, rotated=False), in the order of the data's way; rotated: for a cache format
    # that is (plugins/cache_formats/rotation.py), the same model with latents in another basis
    checkpoint_tensors: Callable[[Config], dict[str, tuple[int, ...]]]  # names and shapes that a checkpoint must have
    originals: Callable[[Iterable[tuple[Weight, Tensor]]], Iterator[tuple[str, Tensor]]]  # `weights` -> checkpoint tensors
    angles: Callable[[Config], dict[str, int]]  # names and widths of what `embed` gives all layers: [T, width] float32
    rank_refusal: Callable[[Config, int], str]  # what numbers of ranks can share the experts, if this one cannot; else ""
    layer_kind: Callable[[Config, int], Hashable]
    embed: Callable[[Config], nn.Module]  # (batch) -> hidden [T, hidden_size], *angles
    layer: Callable[..., nn.Module]  # (hidden, *angles, cache, batch) -> the first two after the
    # layer, and what attention and MLP add to the residual, [T, hidden_size] each
    head: Callable[[Config], nn.Module]  # (hidden, batch) -> logits [N, vocab_size] float32, last_hidden [N, hidden_size]
    step: Callable[..., nn.Module]  # (batch, caches) -> logits, last_hidden, caches


def weight_name(parameter: str) -> str:
    """Weight of a step module's parameter: embed.x, layers.x and head.x lie under model, head.lm_head does not."""
    name = parameter.removeprefix("embed.").removeprefix("head.")
    return name if name.startswith("lm_head.") else f"model.{name}"


def page_shape(config: Config, cache_format: str, page_size: int) -> tuple[int, int]:
    """A page of one layer's latent cache: (page_size, width)."""
    from latentrt.plugins import cache_formats

    return page_size, cache_formats.get(cache_format).width(config.kv_lora_rank, config.qk_rope_head_dim)
