"""The comparison: reference -> torch model -> exported graph -> engine, on the same tokens, stage by stage, layer by layer.

Two references may be needed: transformers on the checkpoint's weights (fidelity), and, where the bundle's weights are
quantized, transformers on the decoded weights (exactness). There is one module in memory; its weights are replaced.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latentrt.export.checkpoint import Checkpoint
from latentrt.runtime.backends.base import Backend
from latentrt.runtime.bundle.manifest import Target
from latentrt.runtime.bundle.reader import Bundle
from latentrt.validation.bisect import runners
from latentrt.validation.calibration.expected import PLAIN, Alone, Expected, expect
from latentrt.validation.dequantize import dequantized_tensors
from latentrt.validation.judge import metrics, weights
from latentrt.validation.judge.excuse import Excuses
from latentrt.validation.judge.findings import Findings
from latentrt.validation.judge.greedy import compare_greedy
from latentrt.validation.judge.layers import judge_layers, judge_routing, trace_stage
from latentrt.validation.judge.metrics import LogitComparison
from latentrt.validation.judge.paired import Paired, largest_error
from latentrt.validation.judge.tolerances import REPORTED, Tolerance, Tolerances
from latentrt.validation.reference.model import Reference, Trace
from latentrt.validation.stages import engine_graph, exported_graph, numerics
from latentrt.validation.stages.base import PAGE_SIZE, Force, Stage
from latentrt.validation.stages.executor import Executor
from latentrt.validation.stages.graph import EngineStage, GraphStage
from latentrt.validation.stages.model import ModelStage
from latentrt.validation.tokens import Tokens

MODE_WINDOWS = 4  # windows for chunked and decode runs of the engine
DECODE_STEPS = 64
EARLY_TOKENS, EARLY_WINDOWS, EARLY_STEPS = 96, 2, 8  # of torch model and exported graph, which are slow forms


@dataclass(frozen=True)
class Subject:
    """What is validated, and against what."""

    bundle: Bundle
    target_name: str
    checkpoint: Checkpoint
    tokens: Tokens
    tolerances: Tolerances
    executor: Executor
    threads: int = 0


def pages_for(target: Target, windows: list[np.ndarray]) -> int:
    """Of the cache, for MODE_WINDOWS of the windows at a time."""
    return MODE_WINDOWS * (1 + -(-len(windows[0]) // target.cache.page_size))


Progress = Callable[[str], None]


class Comparison:
    """Runs everything for one target; `run` returns the findings."""

    def __init__(self, subject: Subject, progress: Progress = lambda stage: None):
        self.s, self.progress = subject, progress
        self.findings = Findings(tolerances=subject.tolerances.name)
        self.target = subject.bundle.manifest.targets[subject.target_name]
        self.quantized = self.target.precision != "fp32"
        self.windows = subject.tokens.windows

    def run(self) -> Findings:
        """Every link in turn. Raises ReferenceRefused, ValidationError, BundleError or CheckpointError."""
        s, f = self.s, self.findings
        f.text = {"source": s.tokens.source, "tokens": sum(map(len, self.windows)), "windows": len(self.windows),
                  "window": len(self.windows[0]), "is_text": s.tokens.is_text}  # fmt: skip
        with self._timed("audit and load the reference"):
            self.reference = Reference(s.checkpoint)
            f.audit = [vars(c) for c in self.reference.audit]
            self.trace = self.reference.trace(self.windows[0])
            self.given = Force(self.trace.routing, self.trace.hidden)
        self._files()
        self._weights()
        with ExitStack() as loaded:
            with self._timed("load the engine"):
                backend = loaded.enter_context(self._load())
                self.engine = self._engine(backend)
                f.executed = s.executor.describe(backend)
            self._early_stages()
            with self._timed("emulate the engine's roundings"):
                self._emulate(backend)
            with self._timed("engine against the original weights"):
                self._fidelity()
            self._exactness()
        return f

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        self.progress(name)
        start = time.monotonic()
        yield
        self.findings.seconds[name] = round(time.monotonic() - start, 2)

    def _files(self) -> None:
        with self._timed("verify digests"):
            wrong = self.s.bundle.verify()
        reason = "evidence speaks of the files that the manifest names, so their content must be what was built"
        self.findings.judge("files with a wrong digest", "bundle", len(wrong), Tolerance(0, reason), "; ".join(wrong[:2]))

    def _weights(self) -> None:
        with self._timed("weights of the bundle"):
            found = weights.compare(self.s.bundle, self.s.target_name, self.s.checkpoint)
        self.findings.weights = [vars(w) for w in found]
        t = self.s.tolerances
        for name, members, tolerance in (
            ("largest error of plain weights", [w for w in found if not w.quantized], t.plain_weights),
            ("largest error of quantized weights", [w for w in found if w.quantized], t.weights),
        ):
            if members:
                bad = next((w for w in members if not tolerance.passes(w.error)), None)
                detail = f"{bad.name} is off by {bad.error:.2g} of its row's largest element" if bad else ""
                self.findings.judge(name, "weights", max(w.error for w in members), tolerance, detail)

    def _load(self) -> Backend:
        return self.s.executor.load(pages_for(self.target, self.windows) * self.target.cache.page_size, self.s.threads)

    def _engine(self, backend: Backend) -> EngineStage:
        executor = self.s.executor
        debug = engine_graph.load(executor, backend, self.s.threads, self.findings.notes)
        return EngineStage(backend, debug, engine_graph.logit_rows(executor))

    def _early_stages(self) -> None:
        """Torch model and exported graph, against transformers on the checkpoint's weights: only sums may round."""
        checkpoint, length = self.s.checkpoint, len(self.windows[0])
        pages = 2 + EARLY_WINDOWS * (2 + length // PAGE_SIZE)
        cut = [w[:EARLY_TOKENS] for w in self.windows[:EARLY_WINDOWS]]
        with tempfile.TemporaryDirectory(prefix="latentrt-") as folder:
            stages: list[Stage] = []
            with self._timed("torch model"):
                stages.append(ModelStage(checkpoint, pages))
            with self._timed("exported graph"):
                stages.append(GraphStage(exported_graph.export(checkpoint, Path(folder), PAGE_SIZE, self.s.threads), pages))
            with self._timed("both on the reference's inputs"):
                logits = [self.reference.logits(w) for w in cut]
                runs = [_modes(stage, cut, EARLY_STEPS) for stage in stages]
                alone = {stage.name: self._trace(stage) for stage in stages}
            with self._timed("emulate float32"):
                expected = expect(checkpoint, PLAIN, cut, Alone(self.windows[0], self.given, alone))
                for stage, found in zip(stages, runs, strict=True):
                    self._judge_runs(stage, cut, logits, found, expected, True, EARLY_STEPS)
                    judge_layers(stage.name, expected.spreads[stage.name], self.findings)
                    judge_routing(stage.name, self.findings)

    def _trace(self, stage: Stage) -> Trace:
        return trace_stage(stage, self.windows[0], self.trace, self.reference, self.findings)

    def _emulate(self, backend: Backend) -> None:
        executor, window = self.s.executor, self.windows[0]
        graph = runners.runner(executor, self.s.threads).model
        rounded = numerics.of(executor, graph, backend.gpu is not None)
        self.exact = rounded.is_exact
        found = {"engine": self.engine.trace(window, self.given)} if self.engine.can_trace else {}
        alone = Alone(window, self.given, found) if found else None
        self.expected = expect(self.s.checkpoint, rounded, self.windows, alone)

    def _judge_runs(
        self, stage: Stage, windows: list[np.ndarray], logits: list[np.ndarray], runs: dict, expected: Expected, exact: bool,
        steps: int,
    ) -> Tolerance:  # fmt: skip
        """Judges logits [T, V] of `runs` (mode -> one per window; `steps` decode steps) against the reference's `logits`;
        returns the limit of a logit.

        exact: only sums round, so that single logits are judged, tokens after a flip on a near tie excused.
        """
        emulated = [expected.logits(k) for k in range(len(windows))]
        errors = [metrics.max_abs_error(*pair) for pair in zip(logits, emulated, strict=True)]
        limit = largest_error(errors) if exact else REPORTED
        excuses, modes = Excuses(self.reference, stage, limit, self.findings), []
        for mode, found in runs.items():
            pairs, whole, worst = Paired(), LogitComparison(), 0.0
            for window, e, g, m in zip(windows, logits, found, emulated, strict=True):
                off = whole.add(e[: len(g)], g)
                used = excuses.used(window, off)
                worst = max(worst, float(off[:used].max(initial=0.0)))
                pairs.add(window, e, g, m, counted(mode, len(window), used, steps))
            self.findings.logits.setdefault(stage.name, {})[mode] = whole.summary() | {"judged_max_abs_error": worst}
            self.findings.judge(f"logits, {mode}: largest error", stage.name, worst, limit, excuses.detail(worst))
            modes.append(pairs)
        max(modes, key=Paired.kl_ratio).judge_kl(self.findings, "mean KL, same weights, worst mode", stage.name)
        return limit

    def _fidelity(self) -> None:
        """The engine's prefill of all windows against transformers on the original weights."""
        whole, pairs = LogitComparison(), Paired()
        nll: dict[str, list[np.ndarray]] = {"reference": [], "engine": []}
        limit = REPORTED
        for k, window in enumerate(self.windows):
            logits, found, emulated = self.reference.logits(window), self.engine.prefill(window), self.expected.logits(k)
            off = whole.add(logits, found)
            if self.exact:
                limit = largest_error([metrics.max_abs_error(logits, emulated)])
            excuses = Excuses(self.reference, self.engine, limit, self.findings)
            pairs.add(window, logits, found, emulated, slice(excuses.used(window, off)))
            for name, values in (("reference", logits), ("engine", found)):
                nll[name].append(metrics.negative_log_likelihood(values[:-1], window[1:]))
        f = self.findings
        f.fidelity = whole.summary()
        f.perplexity = {name: metrics.perplexity(np.concatenate(v)) for name, v in nll.items()}
        f.perplexity["ratio"] = f.perplexity["engine"] / f.perplexity["reference"]
        f.series |= {"kl": whole.kl, "top1": whole.equal, "nll": nll}
        pairs.judge_kl(f, "mean KL to the original, nats", "engine")
        pairs.judge_top1(f, "top-1 of the original", "engine")
        pairs.judge_losses(f, "perplexity: |ratio to the original - 1|", "engine")

    def _exactness(self) -> None:
        """The engine against transformers on the engine's own weights: all modes, layers, routing, greedy tokens."""
        if self.quantized:
            with self._timed("decode the bundle's weights into the reference"):
                decoded = dequantized_tensors(self.s.bundle, self.s.target_name)
                self.reference.use_weights(decoded, "the bundle's decoded weights")
            self.trace = self.reference.trace(self.windows[0])
        windows = self.windows[:MODE_WINDOWS]
        with self._timed(f"engine against {self.reference.weights}"):
            runs, logits = _modes(self.engine, windows, DECODE_STEPS), [self.reference.logits(w) for w in windows]
            limit = self._judge_runs(self.engine, windows, logits, runs, self.expected, self.exact, DECODE_STEPS)
        if self.engine.can_trace:
            with self._timed("engine, layer by layer"):
                self._trace(self.engine)
                judge_layers("engine", self.expected.spreads["engine"], self.findings)
                judge_routing("engine", self.findings)
                routed = self.findings.traced["engine"]["logits_routed"]
                self.findings.judge("logits with the reference's routing: largest error", "engine", routed, limit)
        with self._timed("greedy generation"):
            compare_greedy(self.engine, self.reference, self.windows, limit, self.findings)


def counted(mode: str, length: int, used: int, steps: int) -> slice:
    """Tokens of a window that a mode is judged by: of decoding those that were decoded, before the first excused one."""
    return slice(max(1, length - steps) if mode == "decode" else 0, used)


def _modes(stage: Stage, windows: list[np.ndarray], steps: int) -> dict[str, list[np.ndarray]]:
    """Logits of the windows in three ways; `steps` decode steps."""
    return {"prefill": [stage.prefill(w) for w in windows], "chunked": stage.chunked(windows),
            "decode": stage.decode(windows, steps)}  # fmt: skip
