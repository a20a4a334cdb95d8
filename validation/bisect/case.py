"""One part of an engine on the script's inputs, with its formulas: what a verdict on a tensor, and a diagnosis, is made of."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from latentrt.export.checkpoint import Checkpoint
from latentrt.export.models.base import Config, Weight
from latentrt.validation.bisect import spread, tensors
from latentrt.validation.bisect.parts import Part
from latentrt.validation.bisect.replay import Replay
from latentrt.validation.bisect.script import Script, Step
from latentrt.validation.bisect.spread import Spread
from latentrt.validation.dequantize import StoredWeights
from latentrt.validation.reference import layer as formula
from latentrt.validation.reference.arithmetic import Emulated, Exact, Numerics
from latentrt.validation.reference.layer import Layer, Rows

DRAWS = 2  # emulations, which differ in the noise of sums
_ULP = 2.0**-23  # of float32, relative
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """What is the same for all parts. plain: the checkpoint's weights, by the graph's names; inner: in the cache's basis."""

    checkpoint: Checkpoint
    stored: StoredWeights
    numerics: Numerics
    script: Script
    plain: Mapping[str, Weight]
    inner: Mapping[str, Weight]

    @property
    def config(self) -> Config:
        return self.checkpoint.config

    def exact(self, inner: bool = False) -> Exact:
        return Exact(self.inner if inner else self.plain, self.checkpoint.read)

    def emulated(self, seed: int = 0) -> Emulated:
        return Emulated(self.inner, self.checkpoint.read, self.numerics, seed)

    def noise(self, seed: int, *shape: int) -> Tensor:
        """Normally distributed, the same every time."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Case(ABC):
    """`found`: the engine's tensors by tap, [T, ...] float64 or integers. `known`: what this part's tensors are called."""

    known: Mapping[str, tensors.Tensor]

    def __init__(self, subject: Subject, part: Part, found: Values):
        self.s, self.part, self.found = subject, part, found

    @property
    def taps(self) -> list[str]:
        """In the order of the data's way."""
        return [tap for tap in self.known if tap in self.found]

    @property
    @abstractmethod
    def exact(self) -> Values:
        """The formulas' tensors."""

    @property
    @abstractmethod
    def emulated(self) -> list[Values]:
        """The same with the engine's roundings, several times."""

    def spread(self, tap: str) -> Spread:
        """Found error against what roundings make."""
        emulated = [self.judged(tap, e) for e in self.emulated]
        return spread.compare(self.judged(tap, self.exact), self.judged(tap, self.found), emulated)

    def judged(self, tap: str, values: Mapping[str, Tensor]) -> Tensor:
        """[T, width] of a tensor."""
        return values[tap].flatten(1).double()

    def weights_behind(self, tap: str) -> list[Weight]:
        """The weights between the last tensor that is looked at and this one."""
        return tensors.weights_behind(self.known, tap, set(self.found), self.s.inner, self.part.name)

    def weights_before(self, tap: str) -> list[Weight]:
        """All of the part up to this tensor."""
        return tensors.weights_behind(self.known, tap, set(), self.s.inner, self.part.name)

    def module(self, name: str) -> str:
        """The checkpoint's name of a module of this part."""
        return name

    def rows_of(self, step: Step) -> np.ndarray:
        """Which rows of the tensors a step's are."""
        return step.rows


class LayerCase(Case):
    """One layer. From the experts on all follow the choice that the engine made, with the weights that are right for it."""

    known = tensors.LAYER

    def __init__(self, subject: Subject, index: int, part: Part, rows: Rows, ran: Replay):
        self.index, self.rows = index, rows
        c, cache = subject.config, subject.numerics.cache
        written, left = (cache.decode(cells, c.kv_lora_rank, c.qk_rope_head_dim) for cells in (ran.written, ran.left))
        cached = {"cached latent": written[0].double(), "cached k_pe": written[1].double(), tensors.END: torch.cat(left, -1)}
        super().__init__(subject, part, ran.taps | cached)
        inner = subject.exact(inner=True) if cache.rotated else None
        self.layer = Layer(c, index, subject.exact(), inner)
        ids = self.found.get("topk_ids")
        self.ids = None if ids is None else ids.long().clamp(0, c.n_routed_experts - 1)

    @cached_property
    def exact(self) -> Values:
        return self._routed(self.layer.run(self.rows, self.ids))

    @cached_property
    def emulated(self) -> list[Values]:
        result = [self._routed(self.emulation(k).run(self.rows, self.ids)) for k in range(DRAWS)]
        if self.ids is not None:
            for k, values in enumerate(result):
                values["topk_weights"] = self._rounded(self.exact["topk_weights"], k)
        return result

    def emulation(self, seed: int = 0) -> Layer:
        return Layer(self.s.config, self.index, self.s.emulated(seed))

    def module(self, name: str) -> str:
        return f"{self.part.name}.{name}".rstrip(".")

    def judged(self, tap: str, values: Mapping[str, Tensor]) -> Tensor:
        """Of the cache in the end, what was not forgotten."""
        first = self.s.script.first_row if tap == tensors.END else 0
        return super().judged(tap, values)[first:]

    def next_hidden(self) -> Tensor:
        """What the next layer gets: the formulas' own, tokens that the engine sent elsewhere with their own experts."""
        hidden = self.exact["hidden"]
        if self.ids is None:
            return hidden
        other = (self.exact["topk_ids"].sort(-1).values != self.ids.sort(-1).values).any(-1)
        if other.any():
            before = self.rows.hidden[other] + self.exact["attention"][other]
            hidden = hidden.clone()
            hidden[other] = self.layer.block(before)["hidden"]
        return hidden

    def _routed(self, values: Values) -> Values:
        """Routing is float32 in every engine, so its weights are held to the engine's own logits."""
        values[tensors.END] = torch.cat([values["cached latent"], values["cached k_pe"]], -1)
        if self.ids is not None:
            values["topk_weights"] = self.layer.weights_of(self.found["router_logits"], self.ids)
        return values

    def _rounded(self, weights: Tensor, seed: int) -> Tensor:
        """Exponentials, their sum, a quotient, a factor: each is off by a unit in the last place or so."""
        noise = self.s.noise(seed, *weights.shape) + self.s.noise(DRAWS + seed, len(weights), 1)
        return (weights * (1 + _ULP * noise)).float().double()


class EmbedCase(Case):
    """The embedding, and the angles of all positions: cos and sin, float32."""

    known = tensors.EMBED

    @cached_property
    def exact(self) -> Values:
        return self.at(self.s.exact())

    @cached_property
    def emulated(self) -> list[Values]:
        """Position times frequency is rounded to float32 once; cosines and sines are off by a unit in the last place."""
        return [self.at(self.s.emulated(k), torch.float32, seed=k) for k in range(DRAWS)]

    def at(
        self, m: Exact, kind: torch.dtype = torch.float64, shift: int = 0, yarn: bool = True, factor: bool = True, seed: int = 0
    ) -> Values:
        """kind: of angles; shift: of positions; yarn, factor: False without; seed: of float32's noise."""
        c, tokens = self.s.config, torch.from_numpy(self.s.script.tokens)
        positions = torch.from_numpy(self.s.script.positions) + shift
        angled = dict(zip(("cos", "sin"), formula.angles(c, positions, kind, yarn, factor), strict=True))
        if kind == torch.float32:
            noise = _ULP * self.s.noise(seed, *angled["cos"].shape)
            angled = {name: (value * (1 + noise)).float().double() for name, value in angled.items()}
        return {"embed_tokens": formula.embed(m, tokens), **angled}


class HeadCase(Case):
    """Final norm and logits of the rows that get them. hidden [T, hidden_size] of all rows."""

    known = tensors.HEAD

    def __init__(self, subject: Subject, part: Part, hidden: Tensor, found: Values):
        self.told = torch.from_numpy(_told(subject.script))
        super().__init__(subject, part, {"logits": found["logits"][self.told]})
        self.hidden = hidden[self.told]

    def rows_of(self, step: Step) -> np.ndarray:
        return np.searchsorted(self.told.numpy(), step.rows[step.batch.logit_rows])

    @cached_property
    def exact(self) -> Values:
        return {"logits": formula.head(self.s.exact(), self.hidden, self.s.config)}

    @cached_property
    def emulated(self) -> list[Values]:
        return [{"logits": formula.head(self.s.emulated(k), self.hidden, self.s.config)} for k in range(DRAWS)]


def _told(script: Script) -> np.ndarray:
    """Rows that get logits in some step."""
    return np.sort(np.concatenate([step.rows[step.batch.logit_rows] for step in script.steps]))
