"""The records of manifest.json, the bundle's passport. What is no field of theirs is refused."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

FORMAT_VERSION = 1
Profiles = dict[str, dict[str, list[list[int]]]]  # name -> input -> smallest, usual and largest shape


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class FileRef(_Record):
    """A file under files/: its name is made of its content."""

    file: Annotated[str, Field(pattern=r"^[0-9a-f]{40}\.[a-z]+$")]
    size: Annotated[int, Field(ge=0)]  # bytes
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TensorInfo(_Record):
    """One input or output of the step graph; dynamic dimensions by name."""

    name: str
    dtype: str
    shape: list[int | str]


class CacheSpec(_Record):
    """One latent cache per layer: [num_pages, page_size, width] of `dtype`."""

    format: str
    dtype: str
    page_size: int
    width: int
    layers: int
    bytes_per_token: int  # over all layers


class Limits(_Record):
    """What a target can be asked for."""

    max_context: int  # tokens of one sequence, prompt and answer together
    max_batch_tokens: int  # rows of one step
    max_sequences: int  # sequences of one step


class Executed(_Record):
    """Where and when a target last ran."""

    machine: str
    date: str


class WeightTensor(_Record):
    """Where one stored tensor lies: `offset` in bytes within `file`, which is one of the weight set's files."""

    file: str
    offset: int
    dtype: str
    shape: list[int]


class WeightSet(_Record):
    """Weights shared by all targets that name this set. `tensors` is what its files' own headers say, by name."""

    precision: str
    layout: str
    cache_transform: str
    files: list[FileRef]
    tensors: dict[str, WeightTensor] = {}


class Kernel(_Record):
    """A compiled kernel that the plugins of a plan launch; `manifest` says how (see plugins/compile.py)."""

    op: str
    function: str
    cubin: FileRef
    manifest: FileRef


class ExpandedEngine(_Record):
    """A second engine for prompt chunks, in which attention expands keys and values (plugins/mla_prefill).

    Inputs, outputs, weight inputs and limits are the target's, and so are weights, caches and kernels.
    """

    graph: FileRef
    onnx: FileRef
    network: FileRef
    profiles: Profiles

    def refs(self) -> Iterator[FileRef]:
        """Its own files."""
        yield from (self.graph, self.onnx, self.network)


class Target(_Record):
    """One engine: a graph or plan, its weights, and what it takes to run it."""

    backend: Literal["onnxruntime", "tensorrt", "tensorrt_rtx", "torch"]
    backend_version: str
    compute_capability: str | None  # "sm89"; None for the CPU
    precision: str
    options: dict[str, str | int | float | bool]
    graph: FileRef
    weight_set: str
    kernels: list[Kernel]
    inputs: list[TensorInfo]  # without weights
    outputs: list[TensorInfo]
    onnx: FileRef | None = None  # the model that a plan was built from: standard ops and the custom ones
    network: FileRef | None = None  # its layers as the engine builder saw them: name, type, output types, plugin
    weight_inputs: list[str] = []  # inputs of the graph that are tensors of the weight set, under their names there
    profiles: Profiles = {}
    expanded: ExpandedEngine | None = None  # absent in bundles of before there was one
    cache: CacheSpec
    limits: Limits
    request: str  # digest of all that this target was built from; equal means up to date
    executed: Executed | None

    def refs(self) -> Iterator[FileRef]:
        """The target's own files."""
        yield from (ref for ref in (self.graph, self.onnx, self.network) if ref)
        yield from self.expanded.refs() if self.expanded else ()
        for kernel in self.kernels:
            yield from (kernel.cubin, kernel.manifest)


class CheckpointFile(_Record):
    size: int
    mtime_ns: int
    sha256: str


class CheckpointInfo(_Record):
    """Where the weights come from."""

    path: str
    digest: str
    files: dict[str, CheckpointFile]


class Manifest(_Record):
    """The bundle's passport."""

    format_version: Literal[1]
    producer: str
    created: str
    architecture: str
    config: dict
    checkpoint: CheckpointInfo
    tokenizer: dict[str, FileRef]  # by the file's name in the checkpoint
    weight_sets: dict[str, WeightSet]
    targets: dict[str, Target]

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        for name, target in self.targets.items():
            if target.weight_set not in self.weight_sets:
                raise ValueError(f"target {name} names the weight set {target.weight_set!r}, which is missing")
        return self

    def refs(self) -> Iterator[FileRef]:
        """Every file of the bundle, some more than once."""
        yield from self.tokenizer.values()
        for weight_set in self.weight_sets.values():
            yield from weight_set.files
        for target in self.targets.values():
            yield from target.refs()
