"""Seconds of one pass of a step: kernels by roofline or as they were measured, collectives by their bytes.

Ranks meet in every collective, so what comes before it lasts as long as on the slowest of them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from latentrt.errors import UserError
from latentrt.planning.assumptions import Assumptions
from latentrt.planning.collectives import Exchange, Link
from latentrt.planning.gpus import GpuRow
from latentrt.planning.paper import Gqa
from latentrt.planning.roofline import Deployment
from latentrt.planning.routing import ROWS, Routing
from latentrt.plugins.step_graph import ABSORBED, FORMS, StepBatch
from latentrt.runtime.backends.forms import FormChooser, Head
from latentrt.runtime.backends.padding import StepShape, decode_shape
from latentrt.runtime.ranks.lockstep import Pass

PAGE = 64  # tokens
PARTS = ("dense", "attention", "experts", "collectives", "launches", "host")
Times = dict[str, float]  # seconds, by PARTS


class Costs(Protocol):
    """What the simulator asks of a model on its GPUs."""

    def seconds(self, ranks: Sequence[Pass]) -> Times:
        """Of a pass, given every rank's part of it."""


@dataclass(frozen=True)
class Speeds:
    """What a GPU reaches of its data sheet."""

    gpu: GpuRow
    assumed: Assumptions

    def products(self, size: float, quantized: float, plain: float) -> float:
        """Seconds of products that read `size` bytes of weights, with so many operations of each kind."""
        g, a = self.gpu, self.assumed
        slow = g.bf16 * a.bf16
        computing = quantized / (g.fp8 * a.fp8 if g.fp8 else slow) + plain / slow
        return max(size / (g.bandwidth * 1e9 * a.hbm), computing / 1e12)

    def attention(self, size: float, operations: float) -> float:
        """Seconds of attention that reads `size` bytes of a cache."""
        g, a = self.gpu, self.assumed
        return max(size / (g.bandwidth * 1e9 * a.cache_hbm), operations / (g.bf16 * a.attention * 1e12))

    @property
    def link(self) -> Link:
        return Link(self.gpu.link / 2 * 1e9 * self.assumed.link, self.assumed.latency_us / 1e6)

    def launches(self, layers: int, captured: bool) -> float:
        """Seconds between the kernels of a pass."""
        return layers * self.assumed.kernels * (self.assumed.graph_us if captured else self.assumed.launch_us) / 1e6


@dataclass(frozen=True)
class Measured:
    """Microseconds of one layer's kernels by size, where they were measured: part -> (size, us), the smallest size first.

    Sizes: of "dense" a rank's rows, of "attention" the tokens that they see, of "experts" the rows of all ranks.
    """

    points: dict[str, list[tuple[float, float]]]

    @classmethod
    def read(cls, path: Path) -> "Measured":
        """Of a JSON file such as {"experts": [[256, 310.5], [2048, 420.0]]}. UserError says what is wrong."""
        accepted = 'a JSON object such as {"experts": [[256, 310.5], [2048, 420]]}, parts: dense, attention, experts'
        try:
            found = json.loads(path.read_text())
            points = {name: [(float(size), float(us)) for size, us in rows] for name, rows in found.items()}
        except OSError as error:
            raise UserError(f"--kernel-times: {path} cannot be read ({error.strerror})") from None
        except (ValueError, TypeError, AttributeError):
            raise UserError(f"--kernel-times: {path} is not what is accepted: {accepted}") from None
        for name, rows in points.items():
            if name not in PARTS[:3] or not rows:
                raise UserError(f"--kernel-times: {path} has {name!r} with {len(rows)} sizes, accepted: {accepted}")
            rising = all(one[0] < next_[0] for one, next_ in pairwise(rows))
            if not rising or rows[0][0] < 1 or min(us for _, us in rows) <= 0:
                raise UserError(f"--kernel-times: {path}: sizes of {name!r} must rise from 1 or more, and times lie above 0")
        return cls(points)

    def seconds(self, part: str, size: float, layers: int) -> float | None:
        """Of so many layers, linear between sizes and in proportion beyond the largest; None if nothing was measured."""
        if part not in self.points or not size:
            return None
        sizes, times = zip(*self.points[part], strict=True)
        return float(np.interp(size, sizes, times)) * max(1.0, size / sizes[-1]) * layers / 1e6


@dataclass(frozen=True)
class Seen:
    """What the rows of a batch see: cached tokens before it, new ones, and pairs of a new row and a token at or before it."""

    past: int
    new: int
    pairs: int

    @classmethod
    def of(cls, batch: StepBatch) -> "Seen":
        new, past = np.diff(batch.query_starts).astype(np.int64), batch.cached_lengths.astype(np.int64)
        return cls(int(past.sum()), int(new.sum()), int((new * past + new * (new + 1) // 2).sum()))


class ExpertParallel:
    """A model of the DeepSeek-V2 family: every rank attends for its own sequences, all share the routed experts."""

    def __init__(self, deployment: Deployment, speeds: Speeds, exchange: str, routing: Routing, measured: Measured):
        self.deployment, self.model, self.speeds = deployment, deployment.model, speeds
        self.routing, self.measured, self.random = routing, measured, np.random.default_rng(routing.seed)
        self.exchange = Exchange(self.model.config, deployment.count, exchange, routing.reached)
        c = self.model.config
        self.chooser = FormChooser(FORMS, Head(c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, PAGE))
        self.layers, self.expert_layers = c.num_hidden_layers, self.model.expert_layers
        self.cache_bytes = self.model.cache_bytes(deployment.cache_format)
        self.expansion, self.operations = self.model.expansion_operations, self.model.operations(deployment.weight_format)
        size, head = self.model.weight_bytes(deployment.weight_format), self.model.head_bytes(deployment.weight_format)
        self.bytes = {"head": head, "rest": size.rest - head, "routed": size.routed}
        self.pair = dict(zip(FORMS, (self.model.absorbed_operations, self.model.expanded_operations), strict=True))

    def seconds(self, ranks: Sequence[Pass]) -> Times:
        captured = [decode_shape(p.batch, least=p.least) if p.decoding else None for p in ranks]
        shapes = [own or StepShape.of(p.batch).at_least(p.least) for own, p in zip(captured, ranks, strict=True)]
        own = [self._own(p.batch, shape, bool(c)) for p, shape, c in zip(ranks, shapes, captured, strict=True)]
        dense, attention = max(own, key=sum)
        rows = [int(p.batch.num_tokens[0]) for p in ranks]
        padded = max(shape.rows for shape in shapes)
        exchange = self.expert_layers * self.exchange.seconds(self.speeds.link, padded, max(rows))
        return {
            "dense": dense, "attention": attention, "experts": self._experts(sum(rows)),
            "collectives": exchange * (1 - self.speeds.assumed.overlap),
            "launches": self.speeds.launches(self.layers, captured[0] is not None),
        }  # fmt: skip

    def _own(self, batch: StepBatch, shape: StepShape, captured: bool) -> tuple[float, float]:
        """A rank's products with the weights that all have, and its attention."""
        dense = self.measured.seconds("dense", shape.rows, self.layers) or self._products("rest", shape.rows)
        return dense + self._products("head", shape.logit_rows), self._attention(batch, shape, captured)

    def _products(self, kind: str, rows: int) -> float:
        return self.speeds.products(self.bytes[kind], *(rows * n for n in self.operations[kind]))

    def _attention(self, batch: StepBatch, shape: StepShape, captured: bool) -> float:
        seen = Seen.of(batch)
        if (measured := self.measured.seconds("attention", seen.past + seen.new, self.layers)) is not None:
            return measured
        form = ABSORBED if captured else self.chooser.form(batch, shape)
        expansion = 0 if form == ABSORBED else seen.past * self.expansion  # new rows' is among the products
        size = (seen.past + seen.new) * self.cache_bytes
        return self.speeds.attention(size, seen.pairs * self.pair[form] + expansion)

    def _experts(self, rows: int) -> float:
        """Of all layers, each as long as on the rank that takes longest there."""
        layers, c = self.expert_layers, self.model.config
        if not layers or (measured := self.measured.seconds("experts", rows, layers)) is not None:
            return measured if layers else 0.0
        size = self.bytes["routed"] / layers / c.n_routed_experts
        quantized, plain = (n / layers / c.num_experts_per_tok for n in self.operations["routed"])
        touched, choices = self.routing.loads(rows, int(self.random.integers(ROWS)))
        reading, computing = self.speeds.products(size, 0, 0), self.speeds.products(0, quantized, plain)
        return layers * float(np.maximum(touched * reading, choices * computing).max(1).mean())


class TensorParallel:
    """A dense model in bfloat16 whose every layer is shared out; two sums over all GPUs a layer. One scheduler serves all."""

    def __init__(self, model: Gqa, count: int, speeds: Speeds):
        self.model, self.count, self.speeds = model, count, speeds
        self.head = model.vocab * model.hidden  # parameters

    def seconds(self, ranks: Sequence[Pass]) -> Times:
        (part,), model = ranks, self.model
        rows, seen = part.least.rows, Seen.of(part.batch)
        dense = self._products(model.parameters - 2 * self.head, rows) + self._products(self.head, len(part.batch.logit_rows))
        size, operations = (seen.past + seen.new) * model.cache_bytes, seen.pairs * model.pair_operations
        summed = 2 * model.layers * 2 * (self.count - 1) / self.count * rows * model.hidden * 2
        return {
            "dense": dense, "attention": self.speeds.attention(size / self.count, operations / self.count), "experts": 0.0,
            "collectives": self.speeds.link.seconds(summed, 2 * model.layers) * (1 - self.speeds.assumed.overlap),
            "launches": self.speeds.launches(model.layers, part.decoding),
        }  # fmt: skip

    def _products(self, parameters: float, rows: int) -> float:
        return self.speeds.products(2 * parameters / self.count, 0, 2 * parameters * rows / self.count)
