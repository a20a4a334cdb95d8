"""Replays an engine part by part and names the first tensor that is not what its formulas and its formats' roundings make it.

Every part gets the formulas' own hidden states as input, so that no error hides behind an earlier one. In memory are one part's
weights in the engine, one tensor of the checkpoint, and hidden states.
"""

import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from latentrt.export.checkpoint import Checkpoint
from latentrt.export.layerwise import threads_for
from latentrt.validation.bisect import diagnosis, runners, script
from latentrt.validation.bisect.case import Case, EmbedCase, HeadCase, LayerCase, Subject
from latentrt.validation.bisect.diagnosis import Defect
from latentrt.validation.bisect.extract import Extraction
from latentrt.validation.bisect.parts import ANGLES, EngineGraph, Part
from latentrt.validation.bisect.replay import replay
from latentrt.validation.bisect.runners import Runner
from latentrt.validation.bisect.spread import Spread
from latentrt.validation.dequantize import StoredWeights
from latentrt.validation.errors import ValidationError
from latentrt.validation.judge.routing import Flip
from latentrt.validation.reference.audit import audit
from latentrt.validation.reference.layer import Rows
from latentrt.validation.reference.model import auditable, quiet_transformers
from latentrt.validation.stages import numerics
from latentrt.validation.stages.executor import Executor
from latentrt.validation.tokens import Tokens

ROUNDING, FLIP, DEFECT = "rounding", "routing flip on a near tie", "defect"


@dataclass(frozen=True)
class Looked:
    """A tensor that was compared, by the part's and its own name, the checkpoint's, and the graph's."""

    part: str
    tensor: str
    module: str
    value: str
    spread: Spread


@dataclass
class Bisection:
    """What was found. `flips`: tokens that near ties sent to other experts. peak_bytes: most memory of the process."""

    looked: list[Looked] = field(default_factory=list)
    defects: list[Defect] = field(default_factory=list)
    flips: list[Flip] = field(default_factory=list)
    text: dict = field(default_factory=dict)
    executed: dict = field(default_factory=dict)
    audit: list[dict] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def passed(self) -> bool:
        return not self.defects

    @property
    def verdict(self) -> str:
        return DEFECT if self.defects else FLIP if self.flips else ROUNDING


class Bisect:
    """One target of a bundle against its checkpoint. Raises ValidationError where the graph cannot be taken apart."""

    def __init__(self, executor: Executor, checkpoint: Checkpoint, tokens: Tokens):
        self.executor, self.found = executor, Bisection()
        self.extraction: Extraction | None = None
        target, bundle = executor.target, executor.bundle
        self.runner: Runner = runners.runner(executor, len(os.sched_getaffinity(0)))
        self.graph = EngineGraph(self.runner.model, [i.name for i in target.inputs])
        limits = target.limits
        planned = script.plan(tokens.windows, target.cache.page_size, limits.max_batch_tokens, limits.max_context)
        stored = StoredWeights(bundle, executor.name)
        rounded = numerics.of(executor, self.runner.model, self.runner.has_kernels).numerics
        plain, inner = ({w.name: w for w in checkpoint.weights(rotated)} for rotated in (False, stored.rotated))
        self.s = Subject(checkpoint, stored, rounded, planned, plain, inner)
        self.found.executed = executor.describe(self.runner)
        self.found.text = {
            "source": tokens.source, "is_text": tokens.is_text, "tokens": len(planned.tokens), "steps": len(planned.steps),
            "sequences": [len(s.tokens) for s in planned.sequences], "pages": planned.num_pages - 1,
        }  # fmt: skip

    def extract(self, folder: Path, part: str | None = None) -> None:
        """`run` writes a part into `folder`: the first with a defect, or the one of that name. Raises ValidationError."""
        if part and part not in self.graph.part_names:
            raise ValidationError(f"part is {part!r}, accepted: {', '.join(self.graph.part_names)}")
        self.extraction = Extraction(folder, part)

    @property
    def stages(self) -> int:
        """Of which `run` tells `progress`: the audit, embedding, layers and head."""
        return self.graph.num_layers + 3

    @torch.no_grad()
    def run(self, progress: Callable[[str], None] = lambda stage: None) -> Bisection:
        """Every part in the order of the data's way. Raises ReferenceRefused, ValidationError, BundleError, CheckpointError."""
        start, config = time.monotonic(), self.s.config
        self.progress = progress
        progress("audit of the reference")
        with quiet_transformers():
            self.found.audit = [vars(check) for check in audit(config, auditable(self.s.checkpoint))]
        with threads_for(config):
            self._parts()
        self.found.seconds = round(time.monotonic() - start, 2)
        self.found.peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return self.found

    def _parts(self) -> None:
        hidden, cos, sin = self._embed()
        for index in range(self.graph.num_layers):
            hidden = self._layer(index, hidden, cos, sin)
        self._head(hidden)

    def _embed(self) -> tuple[Tensor, Tensor, Tensor]:
        part = self._told(self.graph.embed())
        case = EmbedCase(self.s, part, replay(self.runner, part, self.s.script, {}).taps)
        self._judge(case, {})
        values = case.exact
        return values["embed_tokens"], values["cos"].float(), values["sin"].float()

    def _told(self, part: Part) -> Part:
        """Tells of a part that comes, and lets go of what was mapped of the checkpoint for the one before."""
        self.progress(part.name)
        self.s.checkpoint.release()
        return part

    def _layer(self, index: int, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        part = self._told(self.graph.layer(index))
        hidden = self._given(hidden)
        given = {self.graph.hidden_before(index): hidden.float().numpy(), ANGLES[0]: cos.numpy(), ANGLES[1]: sin.numpy()}
        ran = replay(self.runner, part, self.s.script, given)
        sequences = tuple(s.rows for s in self.s.script.sequences)
        case = LayerCase(self.s, index, part, Rows(hidden, cos.double(), sin.double(), sequences), ran)
        self._judge(case, given)
        return case.next_hidden()

    def _head(self, hidden: Tensor) -> None:
        part = self._told(self.graph.head())
        hidden = self._given(hidden)
        given = {self.graph.hidden_before(self.graph.num_layers): hidden.float().numpy()}
        self._judge(HeadCase(self.s, part, hidden, replay(self.runner, part, self.s.script, given).taps), given)

    def _given(self, hidden: Tensor) -> Tensor:
        """Hidden states as the engine's type holds them: both sides get the very same."""
        return hidden.to(self.s.numerics.activation).double()

    def _judge(self, case: Case, given: dict) -> None:
        """Looks at the tensors of a part in order, up to the first that is off; `given` are the part's inputs."""
        found = next(filter(None, (self._routing(case) if t == "topk_ids" else self._tensor(case, t) for t in case.taps)), None)
        if found:
            self.found.defects.append(found)
        if self.extraction and self.extraction.takes(case.part.name, found):
            spreads = {k.tensor: k.spread for k in self.found.looked if k.part == case.part.name}
            self.extraction.write(self.runner, case, given, spreads, found)

    def _routing(self, case: LayerCase) -> Defect | None:
        found, flips = diagnosis.routing(case)
        self.found.flips += flips
        return found

    def _tensor(self, case: Case, tap: str) -> Defect | None:
        spread, part = case.spread(tap), case.part
        value = part.taps.get(tap, part.cache or "")
        self.found.looked.append(Looked(part.name, tap, case.module(case.known[tap].module), value, spread))
        if spread.passes:
            return None
        first = next((k for k in self.found.looked if k.part == part.name and k.spread.strays), self.found.looked[-1])
        return diagnosis.diagnose(case, first.tensor, first.spread)
