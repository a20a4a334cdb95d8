"""What every lowering answers, so that the builder knows none of them. See `lowering` in __init__.py for the table."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import onnx_ir as ir
import torch

from latentrt.export import recipe
from latentrt.export.errors import BuildError
from latentrt.export.models import registry
from latentrt.export.models.base import Config, Weight
from latentrt.export.options import TargetSpec
from latentrt.export.quantization import WeightFormat
from latentrt.export.weight_set import StoredWeight
from latentrt.plugins import cache_formats
from latentrt.plugins.launch.compile import CompiledKernel
from latentrt.plugins.step_graph import Limits

_RANK_ROWS = 128  # of a step, which every one of many ranks may have
Profiles = dict[str, dict[str, dict[str, list[int]]]]
Stage = Callable[[str], AbstractContextManager[Callable[[float], None]]]


@dataclass(frozen=True)
class LoweredEngine:
    """What a backend loads (`graph`), the model that it was built from (`onnx`) and its layers (`network`).

    native: the same as `graph` with own kernels for the CPU, which a backend may load instead.
    profiles: name -> input -> "min", "opt" and "max" shape.
    """

    graph: Path
    onnx: Path | None = None
    network: Path | None = None
    native: Path | None = None
    profiles: Profiles = field(default_factory=dict)


@dataclass(frozen=True)
class Lowered:
    """What a lowering made: an engine per form, in the scratch folder, from where the bundle takes it; kernels in a cache.

    All forms have the same inputs, outputs, weights and kernels. weight_inputs are the stored tensors that the graphs take as
    inputs, under their own names.
    """

    engines: dict[str, LoweredEngine]
    inputs: list[ir.Value]
    outputs: list[ir.Value]
    limits: Limits
    kernels: list[CompiledKernel] = field(default_factory=list)
    weight_inputs: list[str] = field(default_factory=list)


def described(values: Sequence[ir.Value]) -> list[dict]:
    """Inputs or outputs as the manifest lists them: name, dtype, shape."""
    shapes = [[d if isinstance(d, int) else str(d.value) for d in v.shape] for v in values]
    return [{"name": v.name, "dtype": v.dtype.name.lower(), "shape": s} for v, s in zip(values, shapes, strict=True)]


def limits(max_context: int, ranks: int) -> Limits:
    """What an engine takes on each of several ranks. Experts see the rows of all: 2,048 of V2's take 193 MB of workspace."""
    found = Limits(max_context)
    rows = max(found.max_batch_tokens // ranks, _RANK_ROWS)
    return replace(found, max_batch_tokens=rows, max_sequences=min(found.max_sequences, rows))


class Lowering(ABC):
    """Lowers for one target. The constructor raises BuildError for what cannot be had, before anything is read."""

    page_size = 64
    gate_up_layout: str  # of the experts' rows in the weight set, see plugins/moe_experts/op.py
    dtype: torch.dtype  # of the step graph's activations and weights
    executes: bool  # whether this machine can run what it builds

    def __init__(self, spec: TargetSpec):
        self.spec = spec

    @property
    @abstractmethod
    def backend_version(self) -> str:
        """Version of the package that builds; BuildError if it is missing."""

    @property
    def cache_format(self) -> str:
        """The latent cache's format, "auto" resolved."""
        return self.spec.cache_format

    @property
    def rotated(self) -> bool:
        """Whether weights are those of the rotated basis of latents."""
        return cache_formats.get(self.cache_format).rotated

    def identity(self) -> dict:
        """All that the result depends on beside checkpoint and product version, for JSON."""
        return self.spec.identity() | {"cache_format": self.cache_format} | self.tools()

    def tools(self) -> dict:
        """Versions of packages and digests of sources that the result depends on."""
        return {self.spec.target.backend: self.backend_version}

    def options(self) -> dict[str, str | int | float | bool]:
        """What the manifest tells of the choices made."""
        chosen = {"recipe": recipe.digest(self.spec.plain_modules)} if self.spec.plain_modules else {}
        return chosen | ({"ranks": self.spec.ranks} if self.spec.ranks > 1 else {})

    def limits(self, config: Config) -> Limits:
        """What the target will take."""
        return limits(self.spec.max_context or config.max_position_embeddings, self.spec.ranks)

    def cache(self, config: Config) -> dict[str, str | int]:
        """The latent cache as the manifest describes it (runtime/bundle/manifest.py, CacheSpec)."""
        layout, sizes = cache_formats.get(self.cache_format), (config.kv_lora_rank, config.qk_rope_head_dim)
        return {
            "format": layout.name, "dtype": str(layout.dtype).removeprefix("torch."), "page_size": self.page_size,
            "width": layout.width(*sizes), "layers": config.num_hidden_layers,
            "bytes_per_token": layout.bytes_per_token(*sizes) * config.num_hidden_layers,
            "fields": [asdict(part) for part in layout.fields(*sizes)],
        }  # fmt: skip

    def check(self, config: Config) -> None:
        """BuildError if the target does not take the model's shapes. Reads nothing, and takes no time."""
        reason = cache_formats.get(self.cache_format).refusal(config.kv_lora_rank, config.qk_rope_head_dim)
        if reason:
            found = f"kv_lora_rank is {config.kv_lora_rank}, qk_rope_head_dim {config.qk_rope_head_dim}"
            raise BuildError(f"cache_format {self.cache_format!r}: {found}; {reason}")
        if self.spec.ranks > 1 and (reason := registry.of(config).rank_refusal(config, self.spec.ranks)):
            raise BuildError(f"ranks is {self.spec.ranks}, accepted: {reason}")

    def engine_bytes(self, config: Config, weights: int) -> int:
        """What the bundle gets beside the weight set, at most: engines, kernels, tokenizer. `weights`: bytes of the set."""
        return 1 << 24

    @abstractmethod
    def weight_format(self, weights: list[Weight]) -> WeightFormat:
        """How the model's weights are stored."""

    def stored_weights(self, weights: list[Weight]) -> list[Weight]:
        """The model's weights in this lowering's layout."""
        return weights

    @abstractmethod
    def lower(
        self, models: Mapping[str, ir.Model], config: Config, weights: list[Weight],
        located: Mapping[str, StoredWeight], files: Path, scratch: Path, stage: Stage,
        activation_scales: Mapping[str, float] | None = None,
    ) -> Lowered:  # fmt: skip
        """Lowers `models`, one per form of the specification, which it may change. `located`: where each stored tensor lies,
        in the folder `files`, which the bundle's files go to as well. What is made is written to `scratch`.
        activation_scales: weight name of every linear -> scale of its input, where the target's activations are static.

        `stage` times a named part of the work and yields the function that advances its bar. Raises BuildError.
        """
