"""The records of manifest.json, the bundle's passport. What is no field of theirs is refused."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from latentrt.plugins.step_graph import DECODE_FORM, Limits

FORMAT_VERSION = 4


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


class CacheField(_Record):
    """A part of one token in a cache: `elements` values in `bits` bits each, `group` of them to a scale (0: no scales)."""

    name: str
    elements: int
    bits: int
    group: int = 0


class CacheSpec(_Record):
    """One latent cache per layer: [num_pages, page_size, width] of `dtype`. `fields` lie one after another in a token."""

    format: str
    dtype: str
    page_size: int
    width: int
    layers: int
    bytes_per_token: int  # over all layers
    fields: list[CacheField]


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

    @property
    def size(self) -> int:
        """Bytes: the first number in a type's name is its bits."""
        return math.prod(self.shape) * int(re.search(r"\d+", self.dtype)[0]) // 8


class ExpertElements(_Record):
    """Elements of routed experts, where they are others than those of the rest: see `quantized` and `zero_point` there."""

    quantized: str
    zero_point: int


class WeightFormat(_Record):
    """How weights are stored: those whose role is in `blocks` as `quantized` elements, all others as `plain` ones, and so are
    all weights of `plain_modules` (a weight's module is its name without the last part).

    weight = (stored - zero_point) * scale. Scales have the type `scale`, and are tensors named `<weight>.scale`. Elements of
    fewer bits than 8 are packed along the inputs, the first in the lowest bits, and their zero point is `zero_point` shifted
    right by the bits that they lack (128 of 8 bits: 8 of 4 bits).
    """

    name: str
    layout: Literal["rows", "panels16"] = "rows"  # of quantized weights; export/quantization/panels.py says how they lie
    plain: str
    quantized: str | None = None
    scale: str | None = None
    zero_point: int = 0
    blocks: dict[str, int] = {}  # role -> inputs that share a scale, at most; 0: all inputs of an output channel
    plain_modules: list[str] = []  # what a recipe left unquantized
    bits: dict[str, int] = {}  # end of a module's name, which goes before, or role -> bits of an element; else 8
    experts: ExpertElements | None = None


class WeightSet(_Record):
    """Weights shared by all targets that name this set. `tensors` is what its files' own headers say, by name."""

    format: WeightFormat
    gate_up_layout: Literal["concatenated", "interleaved"]  # of the experts' rows, as in plugins/moe_experts/op.py
    rotated: bool = False  # latents are in the basis of plugins/cache_formats/rotation.py
    files: list[FileRef]
    tensors: dict[str, WeightTensor] = {}


class Kernel(_Record):
    """A compiled kernel that the plugins of a plan launch; `manifest` says how (see plugins/launch/compile.py)."""

    op: str
    function: str
    cubin: FileRef
    manifest: FileRef


class ShapeRange(_Record):
    """The shapes that an optimization profile allows one input: the smallest, the one it is tuned for, the largest."""

    min: list[int]
    opt: list[int]
    max: list[int]


class EngineFiles(_Record):
    """What a backend loads for one form of the step graph."""

    graph: FileRef  # an ONNX graph, or a plan
    onnx: FileRef | None = None  # the model that a plan was built from: standard ops and the custom ones
    network: FileRef | None = None  # its layers as the engine builder saw them: name, type, output types, plugin
    native: FileRef | None = None  # the ONNX graph with the ops of plugins/cpu, which need a compiler where it runs
    profiles: dict[str, dict[str, ShapeRange]] = {}  # name -> input -> shapes

    def refs(self) -> Iterator[FileRef]:
        """Its files."""
        yield from (ref for ref in (self.graph, self.onnx, self.network, self.native) if ref)


class Target(_Record):
    """What was built for one GPU or CPU: an engine per form, its weights, and what it takes to run it.

    Inputs, outputs, weight inputs, limits, weights, caches and kernels are those of all forms.
    """

    backend: Literal["onnxruntime", "tensorrt", "tensorrt_rtx", "torch"]
    backend_version: str
    compute_capability: str | None  # "sm89"; None for the CPU
    precision: str
    options: dict[str, str | int | float | bool]
    engines: Annotated[dict[str, EngineFiles], Field(min_length=1)]  # by form, see plugins/step_graph.py
    weight_set: str
    kernels: list[Kernel]
    inputs: list[TensorInfo]  # without weights
    outputs: list[TensorInfo]
    weight_inputs: list[str] = []  # inputs of the graph that are tensors of the weight set, under their names there
    cache: CacheSpec
    limits: Limits
    ranks: int = 1  # processes that share the experts
    shared_weights: list[str] = []  # tensors of which each of several ranks has an equal part along axis 0
    built_from: str  # digest of all that this target was built from; equal means up to date
    executed: Executed | None

    @model_validator(mode="after")
    def _check(self) -> "Target":
        if DECODE_FORM not in self.engines:
            raise ValueError(f"has engines {', '.join(self.engines)}, but none of form {DECODE_FORM}")
        return self

    def rows_of(self, name: str, stored: Sequence[int], rank: int) -> slice:
        """Which rows of a tensor of the weight set, of shape `stored`, are a rank's."""
        if name not in self.shared_weights:
            return slice(0, stored[0])
        count = stored[0] // self.ranks
        return slice(rank * count, (rank + 1) * count)

    def refs(self) -> Iterator[FileRef]:
        """The target's own files."""
        for engine in self.engines.values():
            yield from engine.refs()
        for kernel in self.kernels:
            yield from (kernel.cubin, kernel.manifest)


class EndToken(_Record):
    """A token that ends an answer, its text if the tokenizer knows it, and who says so: "config.json", "tokenizer", ..."""

    id: Annotated[int, Field(ge=0)]
    token: str | None
    sources: list[str]


class Text(_Record):
    """What the checkpoint said about text. Without a tokenizer only `end_of_text`, `sampling` and `ignored` say something."""

    tokenizer: FileRef | None = None  # a tokenizer.json that needs no other file
    source: str = ""  # the checkpoint's file, and the class that it is named for or was converted by
    vocab_size: int = 0  # ids, added tokens included
    special_tokens: dict[str, str] = {}  # by role: bos_token, eos_token, ...
    templates: dict[str, FileRef] = {}  # Jinja sources by name: default, tool_use, ...
    end_of_text: list[EndToken] = []
    sampling: dict[str, int | float] = {}  # fields of SamplingParams that generation_config.json gives
    ignored: list[str] = []  # fields of generation_config.json that are not applied, with their values

    def refs(self) -> Iterator[FileRef]:
        """Its files."""
        yield from (ref for ref in (self.tokenizer, *self.templates.values()) if ref)


class CheckpointFile(_Record):
    size: int
    mtime_ns: int
    sha256: str


class CheckpointInfo(_Record):
    """Where the weights come from."""

    path: str
    storage: str  # how its weights were stored, for people: "plain", "GPTQ, 4 bits, groups of 128", ...
    digest: str
    files: dict[str, CheckpointFile]


class Manifest(_Record):
    """The bundle's passport."""

    format_version: Literal[4]
    producer: str
    created: str
    family: str  # model_type of config.json
    config: dict
    checkpoint: CheckpointInfo
    text: Text
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
        yield from self.text.refs()
        for weight_set in self.weight_sets.values():
            yield from weight_set.files
        for target in self.targets.values():
            yield from target.refs()
