"""The least time of a step on GPUs: what memory and tensor cores at their full speed would take. Real steps take longer.

Many GPUs: attention and all that is not a routed expert is on every GPU, which serves its own sequences; routed experts are
shared out. What the GPUs send each other, and their waiting for the slowest, is not counted.
"""

from dataclasses import dataclass, replace

from latentrt.export.lowering import base
from latentrt.export.quantization import WeightFormat
from latentrt.planning.gpus import GpuRow
from latentrt.planning.sizes import Model
from latentrt.plugins.step_graph import Limits

USABLE = 0.9  # of the memory is for weights, cache and workspace; other activations, kernels and the driver take the rest


@dataclass(frozen=True)
class Step:
    """Seconds that a step takes at least, for each of what takes them: reading weights and cache, and computing.

    Reading and computing go on at the same time: the longer of the two is the step's time.
    """

    weights: float
    cache: float
    compute: float

    @property
    def seconds(self) -> float:
        return max(self.weights + self.cache, self.compute)

    @property
    def bound(self) -> str:
        """What takes the most time: weights, cache or compute."""
        if self.compute >= self.weights + self.cache:
            return "compute"
        return "weights" if self.weights >= self.cache else "cache"


@dataclass(frozen=True)
class Deployment:
    """A model with a weight and a cache format on `count` GPUs of one kind.

    rows: of a step on each of them; None: what builds have.
    """

    model: Model
    gpu: GpuRow
    count: int
    weight_format: WeightFormat
    cache_format: str
    rows: int | None = None

    @property
    def limits(self) -> Limits:
        """What each GPU takes in a step."""
        found = base.limits(self.model.config.max_position_embeddings, self.count)
        return replace(found, max_batch_tokens=self.rows, max_sequences=self.rows) if self.rows else found

    @property
    def replicated(self) -> float:
        """Bytes of weights that every GPU holds whole."""
        size = self.model.weight_bytes(self.weight_format)
        return size.embedding + size.rest

    @property
    def held(self) -> float:
        """Bytes of weights that each GPU holds."""
        return self.replicated + self.model.weight_bytes(self.weight_format).routed / self.count

    @property
    def workspace(self) -> int:
        """Bytes that each GPU's experts need beside weights, for the gathered rows of a step."""
        return self.model.workspace_bytes(self.weight_format, self.count * self.limits.max_batch_tokens)

    @property
    def usable(self) -> float:
        """Bytes of each GPU for weights, workspace and cache."""
        return USABLE * self.gpu.memory * 1e9

    @property
    def left(self) -> float:
        """Bytes of each GPU that remain for the cache; 0 where the rest does not fit."""
        return max(0.0, self.usable - self.held - self.workspace)

    @property
    def capacity(self) -> int:
        """Tokens that the caches of all GPUs hold together; 0 where weights do not fit."""
        return self.count * int(self.left // self.model.cache_bytes(self.cache_format))

    def on(self, count: int) -> "Deployment":
        """The same on another number of GPUs."""
        return replace(self, count=count)

    def fewest(self, context: int = 1) -> int | None:
        """The fewest such GPUs that can share the experts and hold one sequence of `context` tokens; None: no number does."""
        one = context * self.model.cache_bytes(self.cache_format)
        return next((n for n in self.model.rank_counts if self.on(n).left >= one), None)

    def largest_batch(self, context: int) -> int:
        """Sequences of `context` tokens that fit; each lies on one GPU."""
        return self.count * (self.capacity // self.count // context)

    def decode(self, batch: int, context: int) -> Step:
        """One token for each of `batch` sequences that have `context` tokens. The fullest GPU has batch / count, rounded up."""
        own, size = -(-batch // self.count), self.model.weight_bytes(self.weight_format)
        routed = size.routed / self.count * self.model.touched_share(batch)
        bytes_a_second = self.gpu.bandwidth * 1e9
        cached = own * context * self.model.cache_bytes(self.cache_format)
        attention = own * context * self.model.absorbed_operations
        computing = self._seconds(*self.model.linear_operations(self.weight_format), own) + attention / (self.gpu.bf16 * 1e12)
        return Step((size.rest + routed) / bytes_a_second, cached / bytes_a_second, computing)

    def prefill(self, tokens: int) -> Step:
        """A prompt of `tokens` tokens on every GPU, in the expanded form; the last one gets logits."""
        size = self.model.weight_bytes(self.weight_format)
        routed = size.routed / self.count * self.model.touched_share(tokens * self.count)
        bytes_a_second = self.gpu.bandwidth * 1e9
        pairs = tokens * (tokens + 1) / 2
        linear = self._seconds(*self.model.linear_operations(self.weight_format, 1 / tokens), tokens)
        computing = linear + pairs * self.model.expanded_operations / (self.gpu.bf16 * 1e12)
        written = tokens * self.model.cache_bytes(self.cache_format)
        return Step((size.rest + routed) / bytes_a_second, written / bytes_a_second, computing)

    def _seconds(self, quantized: float, plain: float, tokens: float) -> float:
        """Of products with weights: quantized ones at the speed of FP8 where there is one."""
        return tokens * (quantized / (self.gpu.fp8 or self.gpu.bf16) + plain / self.gpu.bf16) / 1e12
