"""Records a run of one target, where the engine runs; it is judged where the checkpoint is."""

import os
from collections.abc import Callable
from pathlib import Path

from latentrt.validation import recording, tokens
from latentrt.validation.bisect import runners
from latentrt.validation.compare import DECODE_STEPS, MODE_WINDOWS, pages_for
from latentrt.validation.report import evidence
from latentrt.validation.sources.base import Rows
from latentrt.validation.stages import engine_graph, numerics
from latentrt.validation.stages.executor import Executor
from latentrt.validation.stages.graph import EngineStage
from latentrt.validation.tokens import Tokens

STAGES = 5


def record(
    executor: Executor, text: Path | None, count: int, out: Path, progress: Callable[[str], None] = lambda stage: None
) -> dict:
    """Runs a target on a text, as `tokens.of_bundle` has it, and writes the file; returns its facts.

    Raises what `Executor.check` and `load` raise, and ValidationError where `out` cannot be written.
    """
    recording.check(out)
    executor.check()
    limits = executor.target.limits
    chosen = tokens.of_bundle(executor.bundle, text, count, min(limits.max_context, limits.max_batch_tokens))
    facts, modes, trace = _run(executor, chosen, progress)
    recording.write(out, facts, chosen, modes, trace)
    return facts


def _run(executor: Executor, chosen: Tokens, progress: Callable[[str], None]) -> tuple:
    threads, windows, notes = len(os.sched_getaffinity(0)), chosen.windows, []
    few = windows[:MODE_WINDOWS]
    progress("load the engine")
    with executor.load(pages_for(executor.target, windows) * executor.target.cache.page_size, threads) as backend:
        debug = engine_graph.load(executor, backend, threads, notes)
        engine = EngineStage(backend, debug, engine_graph.logit_rows(executor))
        progress("whole prompts")
        modes = {"prefill": [_rows(w, engine.prefill(w)) for w in windows]}
        progress("ragged chunks")
        modes["chunked"] = list(map(_rows, few, engine.chunked(few)))
        progress("token by token")
        modes["decode"] = list(map(_rows, few, engine.decode(few, DECODE_STEPS)))
        progress("layers and routing")
        trace = engine.trace(windows[0][: recording.TRACED]) if engine.can_trace else None
        executed, has_kernels = executor.describe(backend), backend.gpu is not None
    return _facts(executor, executed, has_kernels) | {"notes": notes}, modes, trace


def _rows(window, logits) -> Rows:
    return Rows.of_logits(window, logits).likeliest(recording.LIKELIEST)


def _facts(executor: Executor, executed: dict, has_kernels: bool) -> dict:
    manifest, graph = executor.bundle.manifest, runners.runner(executor, 1).model
    subject = evidence.subject(executor.bundle, executor.name, manifest.checkpoint.digest, executed)
    return subject | {
        "executed": executed, "evidence_name": executor.evidence_name, "family": manifest.family, "config": manifest.config,
        "decode_steps": DECODE_STEPS, "roundings": numerics.of(executor, graph, has_kernels).record,
    }  # fmt: skip
