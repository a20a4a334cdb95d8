"""What every lowering answers, so that build.py needs to know none of them. See `lowering` in __init__.py for the table."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import onnx_ir as ir
import torch

from export.config import DeepseekV2Config
from export.models.deepseek_v2 import ABSORBED, EXPANDED
from export.models.weights import Weight
from export.quantization import WeightFormat
from export.targets import BuildTarget
from export.weight_set import StoredWeight
from plugins.mla_attention import formats

Stage = Callable[[str], AbstractContextManager[Callable[[float], None]]]


@dataclass(frozen=True)
class Limits:
    """What a target can be asked for: tokens of one sequence, rows of one step, sequences of one step."""

    max_context: int
    max_batch_tokens: int = 2048
    max_sequences: int = 256


@dataclass(frozen=True)
class Request:
    """What one target is built from; equal requests give equal targets. "auto" is resolved already."""

    target: BuildTarget
    precision: str
    accuracy: str
    cache_format: str
    max_context: int
    weights: str  # "inputs" or "embedded" in the plan; a matter of TensorRT
    activations: str = "dynamic"  # scales of FP8 activations: one per token, or "static": one per linear
    prefill: str = "absorbed"  # attention of prompt chunks; "expanded" adds a second engine for them


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel's files: machine code, and the JSON manifest that says how it is launched."""

    op: str
    function: str
    cubin: Path
    manifest: Path


@dataclass(frozen=True)
class Engine:
    """What a backend loads (`graph`), the model that it was built from (`onnx`) and its layers (`network`).

    profiles: name -> input -> smallest, usual and largest shape.
    """

    graph: Path
    onnx: Path | None = None
    network: Path | None = None
    profiles: dict[str, dict[str, list[list[int]]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Lowered:
    """What a lowering made. Engine files lie in the scratch folder, from where the bundle takes them; kernels in a cache.

    weight_inputs are the stored tensors that the graph takes as inputs, under their own names. `expanded` is the engine of
    the expanded form: the same inputs, outputs and weights; `kernels` are those of both.
    """

    engine: Engine
    inputs: list[ir.Value]
    outputs: list[ir.Value]
    limits: Limits
    kernels: list[Kernel] = field(default_factory=list)
    weight_inputs: list[str] = field(default_factory=list)
    expanded: Engine | None = None


def described(values: Sequence[ir.Value]) -> list[dict]:
    """Inputs or outputs as the manifest lists them: name, dtype, shape."""
    shapes = [[d if isinstance(d, int) else str(d.value) for d in v.shape] for v in values]
    return [{"name": v.name, "dtype": v.dtype.name.lower(), "shape": s} for v, s in zip(values, shapes, strict=True)]


class Lowering(ABC):
    """Lowers for one request. The constructor raises BuildError for what cannot be had, before anything is read."""

    page_size = 64
    layout: str  # of the weight set
    dtype: torch.dtype  # of the step graph's activations and weights
    executes: bool  # whether this machine can run what it builds

    def __init__(self, request: Request):
        self.request = request

    @property
    @abstractmethod
    def backend_version(self) -> str:
        """Version of the package that builds; BuildError if it is missing."""

    @property
    def forms(self) -> tuple[str, ...]:
        """Forms of attention whose step graphs it lowers (export.models.deepseek_v2.FORMS)."""
        return (ABSORBED, EXPANDED) if self.request.prefill == EXPANDED else (ABSORBED,)

    @property
    def cache_format(self) -> str:
        """The latent cache's format, "auto" resolved."""
        return self.request.cache_format

    def request_identity(self) -> dict:
        """All that the result depends on beside checkpoint and product version, for JSON."""
        request = asdict(self.request) | {"target": self.request.target.name, "cache_format": self.cache_format}
        return request | self.identity()

    def identity(self) -> dict:
        """What the result depends on beside all that: versions of packages, digests of sources."""
        return {self.request.target.backend: self.backend_version}

    def options(self) -> dict[str, str | int | float | bool]:
        """What the manifest tells of the choices made."""
        return {}

    def limits(self, config: DeepseekV2Config) -> Limits:
        """What the target will take."""
        return Limits(self.request.max_context or config.max_position_embeddings)

    def cache(self, config: DeepseekV2Config) -> dict[str, str | int]:
        """The latent cache as the manifest describes it (runtime/bundle.py, CacheSpec)."""
        layout, sizes = formats.get(self.cache_format), (config.kv_lora_rank, config.qk_rope_head_dim)
        return {
            "format": layout.name, "dtype": str(layout.dtype).removeprefix("torch."), "page_size": self.page_size,
            "width": layout.width(*sizes), "layers": config.num_hidden_layers,
            "bytes_per_token": layout.bytes_per_token(*sizes) * config.num_hidden_layers,
        }  # fmt: skip

    @abstractmethod
    def weight_format(self, config: DeepseekV2Config) -> WeightFormat:
        """How weights are stored."""

    def stored_weights(self, weights: list[Weight]) -> list[Weight]:
        """The model's weights in this lowering's layout."""
        return weights

    @abstractmethod
    def lower(
        self, models: Mapping[str, ir.Model], config: DeepseekV2Config, weights: list[Weight],
        located: Mapping[str, StoredWeight], files: Path, scratch: Path, stage: Stage,
        activation_scales: Mapping[str, float] | None = None,
    ) -> Lowered:  # fmt: skip
        """Lowers `models`, one of each of `forms`, which it may change. `located`: where each stored tensor lies, in the folder
        `files`, which the bundle's files go to as well. What is made is written to `scratch`. activation_scales: weight name
        of every linear -> scale of its input, where the request's activations are static.

        `stage` times a named part of the work and yields the function that advances its bar. Raises BuildError.
        """
