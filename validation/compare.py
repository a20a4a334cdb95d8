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
from latentrt.validation.dequantize import dequantized_tensors
from latentrt.validation.judge import metrics, weights
from latentrt.validation.judge.excuse import Excuses
from latentrt.validation.judge.findings import Findings
from latentrt.validation.judge.greedy import compare_greedy
from latentrt.validation.judge.layers import judge_layers, trace_stage
from latentrt.validation.judge.metrics import LogitComparison
from latentrt.validation.judge.tolerances import Tolerance, Tolerances
from latentrt.validation.reference.model import Reference
from latentrt.validation.stages import engine_graph, exported_graph
from latentrt.validation.stages.base import PAGE_SIZE, Stage
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
        self._files()
        self._weights()
        with ExitStack() as loaded:
            with self._timed("load the engine"):
                backend = loaded.enter_context(self._load())
                self.engine = self._engine(backend)
                f.executed = s.executor.describe(backend)
            self._early_stages()
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
        """Torch model and exported graph, against transformers on the checkpoint's weights."""
        t = self.s.tolerances
        checkpoint, length = self.s.checkpoint, len(self.windows[0])
        pages = 2 + EARLY_WINDOWS * (2 + length // PAGE_SIZE)
        with self._timed("torch model"):
            self._early(ModelStage(checkpoint, pages), t.model_logits)
        with self._timed("exported graph"), tempfile.TemporaryDirectory(prefix="latentrt-") as folder:
            graph = GraphStage(exported_graph.export(checkpoint, Path(folder), PAGE_SIZE, self.s.threads), pages)
            self._early(graph, t.graph_logits)

    def _early(self, stage: Stage, limit: Tolerance) -> None:
        cut = [w[:EARLY_TOKENS] for w in self.windows[:EARLY_WINDOWS]]
        expected = [self.reference.logits(w) for w in cut]
        runs = {"prefill": [stage.prefill(w) for w in cut], "chunked": stage.chunked(cut),
                "decode": stage.decode(cut, EARLY_STEPS)}  # fmt: skip
        self._judge_runs(stage, cut, expected, runs, limit, Tolerance(None, "follows from the logits"))
        trace_stage(stage, self.windows[0], self.trace, self.reference, self.findings)
        judge_layers(stage.name, self.s.tolerances.float_layer, None, self.s.tolerances, self.findings)

    def _judge_runs(self, stage: Stage, windows, expected, runs: dict, limit: Tolerance, kl_limit: Tolerance) -> None:
        """Judges logits [T, V] of `runs` (mode -> one per window) against `expected`, near ties of the routing excused."""
        excuses = Excuses(self.reference, stage, limit, self.findings)
        worst_kl = 0.0
        for mode, found in runs.items():
            comparison, worst = LogitComparison(), 0.0
            for window, e, g in zip(windows, expected, found, strict=True):
                errors = comparison.add(e[: len(g)], g)
                worst = max(worst, excuses.largest(window, errors))
            summary = comparison.summary() | {"judged_max_abs_error": worst}
            self.findings.logits.setdefault(stage.name, {})[mode] = summary
            self.findings.judge(f"logits, {mode}: largest error", stage.name, worst, limit, excuses.detail(worst))
            worst_kl = max(worst_kl, summary["kl_mean"])
        if kl_limit.limit is not None:
            self.findings.judge("mean KL, same weights, worst mode", stage.name, worst_kl, kl_limit)

    def _fidelity(self) -> None:
        """The engine's prefill of all windows against transformers on the original weights."""
        t, comparison = self.s.tolerances, LogitComparison()
        nll: dict[str, list[np.ndarray]] = {"reference": [], "engine": []}
        for window in self.windows:
            expected, found = self.reference.logits(window), self.engine.prefill(window)
            comparison.add(expected, found)
            for name, logits in (("reference", expected), ("engine", found)):
                nll[name].append(metrics.negative_log_likelihood(logits[:-1], window[1:]))
        f = self.findings
        f.fidelity = comparison.summary()
        f.perplexity = {name: metrics.perplexity(np.concatenate(v)) for name, v in nll.items()}
        f.perplexity["ratio"] = f.perplexity["engine"] / f.perplexity["reference"]
        f.series |= {"kl": comparison.kl, "top1": comparison.equal, "nll": nll}
        f.judge("mean KL to the original, nats", "engine", f.fidelity["kl_mean"], t.kl_mean)
        f.judge("top-1 agreement with the original", "engine", f.fidelity["top1_agreement"], t.top1)
        f.judge("perplexity: |ratio to the original - 1|", "engine", abs(f.perplexity["ratio"] - 1), t.perplexity)

    def _exactness(self) -> None:
        """The engine against transformers on the engine's own weights: all modes, layers, routing, greedy tokens."""
        t = self.s.tolerances
        if self.quantized:
            with self._timed("decode the bundle's weights into the reference"):
                decoded = dequantized_tensors(self.s.bundle, self.s.target_name)
                self.reference.use_weights(decoded, "the bundle's decoded weights")
            self.trace = self.reference.trace(self.windows[0])
        windows = self.windows[:MODE_WINDOWS]
        with self._timed(f"engine against {self.reference.weights}"):
            runs = {"prefill": [self.engine.prefill(w) for w in windows], "chunked": self.engine.chunked(windows),
                    "decode": self.engine.decode(windows, DECODE_STEPS)}  # fmt: skip
            expected = [self.reference.logits(w) for w in windows]
            self._judge_runs(self.engine, windows, expected, runs, t.exact_logits, t.exact_kl)
        if self.engine.can_trace:
            with self._timed("engine, layer by layer"):
                trace_stage(self.engine, self.windows[0], self.trace, self.reference, self.findings)
                judge_layers("engine", t.layer, t.token, t, self.findings)
                routed = self.findings.traced["engine"]["logits_routed"]
                self.findings.judge("logits with the reference's routing: largest error", "engine", routed, t.routed_logits)
        with self._timed("greedy generation"):
            compare_greedy(self.engine, self.reference, self.windows, t, self.findings)
