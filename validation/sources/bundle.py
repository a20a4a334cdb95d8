"""A target of a bundle, through a runtime backend."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from latentrt.runtime.bundle.reader import Bundle
from latentrt.validation import tokens
from latentrt.validation.sources import SourceOptions, bundle_parts
from latentrt.validation.sources.base import Rows, Source
from latentrt.validation.stages import engine_graph
from latentrt.validation.stages.executor import Executor
from latentrt.validation.stages.graph import EngineStage
from latentrt.validation.tokens import WINDOW, Tokens


class BundleSource(Source):
    """Raises BundleError, RequestError or ValidationError where this machine cannot run it."""

    kind = "bundle"

    def __init__(self, location: str, options: SourceOptions):
        path, target = bundle_parts(location)
        bundle = Bundle(path)
        self.executor = Executor(bundle, *bundle.target(target), options.backend, options.device)
        self.executor.check()
        super().__init__(f"{path}:{self.executor.name}")
        target = self.executor.target
        self.longest = min(WINDOW, target.limits.max_context, target.limits.max_batch_tokens)
        self.vocab_size = bundle.manifest.config["vocab_size"]
        threads = options.threads or len(os.sched_getaffinity(0))
        self.backend = self.executor.load(self.longest + 2 * target.cache.page_size, threads)
        self.engine = EngineStage(self.backend, None, engine_graph.logit_rows(self.executor))

    def rows(self, windows: list[np.ndarray]) -> Iterator[Rows]:
        return (Rows.of_logits(window, self.engine.prefill(window)) for window in windows)

    def tokens(self, text: Path | None, count: int, longest: int) -> Tokens:
        return tokens.of_bundle(self.executor.bundle, text, count, longest)

    def describe(self) -> dict:
        manifest, target = self.executor.bundle.manifest, self.executor.target
        return {
            "kind": self.kind, "name": self.name, "manifest_sha256": self.executor.bundle.digest,
            "checkpoint_sha256": manifest.checkpoint.digest, "precision": target.precision, "cache_format": target.cache.format,
            "executed": self.executor.describe(self.backend)["summary"],
        }  # fmt: skip

    def close(self) -> None:
        self.backend.close()
