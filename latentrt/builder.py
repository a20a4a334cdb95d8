"""Builds bundles from checkpoints: the composition root of export and runtime."""

import hashlib
import json
import tempfile
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from latentrt import __version__
from latentrt.export import calibration as calibrations
from latentrt.export import graph as step_graphs
from latentrt.export import lowering as lowerings
from latentrt.export import weight_set
from latentrt.export.calibration import Samples
from latentrt.export.checkpoint import Checkpoint, combined_digest
from latentrt.export.errors import BuildError
from latentrt.export.lowering.base import Lowered, LoweredEngine, Lowering, described
from latentrt.export.models import registry
from latentrt.export.options import BuildOptions
from latentrt.export.progress import Report
from latentrt.export.weight_set import StoredWeight
from latentrt.runtime import smoke_test
from latentrt.runtime.bundle.manifest import (
    FORMAT_VERSION,
    CheckpointInfo,
    EngineFiles,
    FileRef,
    Kernel,
    Manifest,
    Target,
    WeightSet,
)
from latentrt.runtime.bundle.writer import BundleWriter, open_writer


def build(checkpoint: Path | str, out: Path | str, options: BuildOptions = BuildOptions(), quiet: bool = True) -> dict:
    """Builds targets into the bundle at `out`, new or old. Returns a summary for machines.

    Every target is committed as it is finished. Raises BuildError, ConfigError, CheckpointError or BundleError; what was
    committed before stays as it was. After an interruption the same call resumes after the last finished shard.
    """
    chosen = [lowerings.find(spec) for spec in options.specs()]
    with Report(quiet) as report:
        with report.stage("read checkpoint headers", shown=False):
            opened = Checkpoint(checkpoint)
            opened.check(opened.expected_tensors())
            smoke_test.check_tokenizer(opened.path, opened.tokenizer_files, opened.config.model_dump())
            _check_context(opened, options.max_context)
            samples = calibrations.read_samples(options.calibration, opened) if options.calibration else None
        with open_writer(Path(out), discard_unreadable=options.force) as writer:
            info = _checkpoint_info(opened, writer.previous, report)
            builder = _Builder(writer, opened, info, report, samples, reread=options.force)
            pending = [x for x in chosen if options.force or not builder.is_current(x)]
            if not options.force:
                _check_replace(out, writer.previous, info, pending, opened.config)
            for lowering in pending:
                builder.add(lowering)
            return _summary(out, writer.previous, chosen, pending, report)


def _check_context(checkpoint: Checkpoint, max_context: int | None) -> None:
    longest = checkpoint.config.max_position_embeddings
    if max_context is not None and not 1 <= max_context <= longest:
        raise BuildError(f"max_context is {max_context}, accepted: 1 to {longest} (max_position_embeddings)")


def _checkpoint_info(checkpoint: Checkpoint, previous: Manifest | None, report: Report) -> CheckpointInfo:
    known = {k: v.model_dump() for k, v in previous.checkpoint.files.items()} if previous else {}
    unread = sum(entry["size"] for entry in checkpoint.unread(known).values())
    with report.stage("checkpoint digest", unread or 1, shown=unread > 0) as advance:
        digests = checkpoint.file_digests(known, advance)
    return CheckpointInfo(path=str(checkpoint.path.resolve()), digest=combined_digest(digests), files=digests)


def _check_replace(out: Path, previous: Manifest | None, info: CheckpointInfo, pending: list[Lowering], config) -> None:
    """A target of the same checkpoint and choices is built anew where the tools changed; anything else needs --force."""
    if previous is None or not pending:
        return
    if previous.checkpoint.digest != info.digest:
        raise BuildError(f"{out}: holds a bundle of another checkpoint ({previous.checkpoint.path}); use --force to replace it")
    for lowering in pending:
        name, old = lowering.spec.target.name, previous.targets.get(lowering.spec.target.name)
        asked = (lowering.spec.precision, lowering.options(), lowering.cache_format, lowering.limits(config).max_context)
        options = old and {k: v for k, v in old.options.items() if k != "calibration"}  # other samples are no other choice
        if old and (old.precision, options, old.cache.format, old.limits.max_context) != asked:
            has = f"{old.precision}, {old.options}, cache {old.cache.format}, context {old.limits.max_context}"
            raise BuildError(f"{out}: has target {name} already ({has}); use --force to replace it")


class _Builder:
    """Builds targets of one checkpoint into one bundle; traces each kind of step graph once.

    `reread`: files of the bundle are used again only if their content fits their digests, not just their sizes.
    """

    def __init__(
        self, writer: BundleWriter, checkpoint: Checkpoint, info: CheckpointInfo, report: Report, samples: Samples | None,
        reread: bool,
    ):  # fmt: skip
        self.writer, self.checkpoint, self.info, self.report, self.samples = writer, checkpoint, info, report, samples
        self.reread = reread
        self.family = registry.of(checkpoint.config)
        self.traced: dict[tuple, dict] = {}

    def is_current(self, lowering: Lowering) -> bool:
        """Whether the bundle has this very target, and all files are there."""
        manifest, name = self.writer.previous, lowering.spec.target.name
        same = manifest and name in manifest.targets and manifest.targets[name].built_from == self._identity(lowering)
        return bool(same) and all(map(self.writer.holds, manifest.refs()))

    def add(self, lowering: Lowering) -> None:
        """Builds one target and commits it."""
        config, name = self.checkpoint.config, lowering.spec.target.name
        weights = lowering.stored_weights(self.family.weights(config))
        key, stored, located = self._weights(lowering, weights)
        models, stage = self._trace(lowering), self.report.stage
        with tempfile.TemporaryDirectory(dir=self.writer.building) as scratch:
            scales = self.activation_scales if lowering.spec.activations == "static" else None
            given = located, self.writer.folder, Path(scratch), stage, scales
            lowered = lowering.lower(models, config, weights, *given)
            target = self._target(lowering, lowered, key)
        with self.report.stage("tokenizer"):
            tokenizer = {f.name: self.writer.copy(f) for f in self.checkpoint.tokenizer_files}
        manifest = self._manifest(tokenizer, {key: stored}, {name: target})
        if lowering.executes:
            with self.report.stage("smoke test"):
                executed = smoke_test.run(self.writer.preview(manifest), name)
                manifest = self._manifest(tokenizer, {key: stored}, {name: target.model_copy(update={"executed": executed})})
        with self.report.stage("commit"):
            self.writer.commit(manifest)

    @cached_property
    def activation_scales(self) -> dict[str, float]:
        """Static scales, the same for all targets that have them."""
        with self.report.stage("calibration", self.checkpoint.config.num_hidden_layers) as advance:
            return calibrations.activation_scales(self.checkpoint, self.samples, advance)

    @cached_property
    def _tokenizer_digest(self) -> str:
        return self.checkpoint.tokenizer_digest()

    def _identity(self, lowering: Lowering) -> str:
        """A digest of all that a target is built from."""
        mine = {"checkpoint": self.info.digest, "tokenizer": self._tokenizer_digest, "version": __version__}
        everything = lowering.identity() | mine | self._calibrated(lowering)
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()

    def _calibrated(self, lowering: Lowering) -> dict[str, str]:
        static = self.samples and lowering.spec.activations == "static"
        return {"calibration": self.samples.digest} if static else {}

    def _weights(self, lowering: Lowering, weights) -> tuple[str, WeightSet, dict[str, StoredWeight]]:
        """The weight set, its key, and where its tensors lie: written now, or in the bundle already."""
        weight_format = lowering.weight_format(weights)
        key, previous = f"{weight_format.key}.{lowering.gate_up_layout}", self.writer.previous
        if previous and previous.checkpoint.digest == self.info.digest and previous.weight_sets.get(key):
            found = previous.weight_sets[key]
            located = {name: StoredWeight.of(**t.model_dump()) for name, t in found.tensors.items()}
            if located and all(self.writer.holds(ref, self.reread) for ref in found.files):
                return key, found, located
        with self.report.stage("weights", len(weight_set.parts(weights))) as advance:
            located = weight_set.write(
                self.checkpoint, weights, weight_format, f"{self.info.digest[:16]}/{key}", self.writer,
                lambda part, size: advance(1),
            )  # fmt: skip
        files = [self.writer.ref(f) for f in dict.fromkeys(w.file for w in located.values())]
        stored = WeightSet(
            format=weight_format.description(), gate_up_layout=lowering.gate_up_layout, files=files,
            tensors={k: w.record() for k, w in located.items()},
        )  # fmt: skip
        return key, stored, located

    def _trace(self, lowering: Lowering) -> dict:
        """The step graphs that the lowering wants, by form; its own copies."""
        kind = {"dtype": lowering.dtype, "cache_format": lowering.cache_format, "page_size": lowering.page_size,
                "forms": lowering.spec.forms}  # fmt: skip
        key = tuple(kind.values())
        if key not in self.traced:
            with self.report.stage("export graph (torch -> ONNX)"):
                self.traced[key] = step_graphs.build_forms(self.checkpoint.config, **kind)
        return {form: model.clone() for form, model in self.traced[key].items()}

    def _target(self, lowering: Lowering, lowered: Lowered, weight_set_key: str) -> Target:
        row, spec = lowering.spec.target, lowering.spec
        return Target(
            backend=row.backend, backend_version=lowering.backend_version, compute_capability=row.compute_capability,
            precision=spec.precision, options=lowering.options() | self._calibrated(lowering),
            engines={form: self._engine(engine) for form, engine in lowered.engines.items()}, weight_set=weight_set_key,
            kernels=[self._kernel(kernel) for kernel in lowered.kernels], weight_inputs=lowered.weight_inputs,
            inputs=described(lowered.inputs), outputs=described(lowered.outputs), limits=lowered.limits,
            cache=lowering.cache(self.checkpoint.config), built_from=self._identity(lowering), executed=None,
        )  # fmt: skip

    def _engine(self, engine: LoweredEngine) -> EngineFiles:
        """The record of an engine; its files are moved into the bundle."""
        files = {"graph": engine.graph, "onnx": engine.onnx, "network": engine.network}
        moved: dict[str, FileRef | None] = {name: file and self.writer.move(file) for name, file in files.items()}
        return EngineFiles(**moved, profiles=engine.profiles)

    def _kernel(self, kernel) -> Kernel:
        copy = self.writer.copy
        return Kernel(
            op=kernel.spec.op, function=kernel.spec.function, cubin=copy(kernel.path), manifest=copy(kernel.manifest)
        )

    def _manifest(self, tokenizer, sets: dict[str, WeightSet], new: dict[str, Target]) -> Manifest:
        """The new manifest: targets and weight sets of the same checkpoint are kept beside the new ones."""
        previous = self.writer.previous
        kept = previous if previous and previous.checkpoint.digest == self.info.digest else None
        now = datetime.now(UTC).isoformat(timespec="seconds")
        all_targets, all_sets = (kept.targets if kept else {}) | new, (kept.weight_sets if kept else {}) | sets
        used = {t.weight_set for t in all_targets.values()}
        return Manifest(
            format_version=FORMAT_VERSION, producer=f"latentrt {__version__}", created=now, family=self.family.model_type,
            config=self.checkpoint.config.model_dump(), checkpoint=self.info, tokenizer=tokenizer,
            weight_sets={k: s for k, s in all_sets.items() if k in used}, targets=all_targets,
        )  # fmt: skip


def _summary(out: Path, manifest: Manifest, chosen: list[Lowering], built: list[Lowering], report: Report) -> dict:
    """What --json prints: all targets under "targets", and the first one's fields again at the top."""
    entries = []
    for lowering in chosen:
        name = lowering.spec.target.name
        target = manifest.targets[name]
        entries.append({"target": name, "precision": target.precision, "built": lowering in built,
                        "backend": target.backend, "backend_version": target.backend_version})  # fmt: skip
    size = sum(ref.size for ref in set(manifest.refs()))
    common = {"bundle": str(out), "bytes": size, "checkpoint": manifest.checkpoint.digest, "seconds": report.seconds}
    return common | entries[0] | {"targets": entries}
