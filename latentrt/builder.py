"""Builds bundles from checkpoints: the composition root of export and runtime."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from latentrt import __version__, preflight
from latentrt.export import calibration as calibrations
from latentrt.export import graph as step_graphs
from latentrt.export import lowering as lowerings
from latentrt.export import text as texts
from latentrt.export import weight_set
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.errors import BuildError
from latentrt.export.lowering.base import Lowered, LoweredEngine, Lowering, described
from latentrt.export.models import registry
from latentrt.export.models.base import Weight
from latentrt.export.options import BuildOptions
from latentrt.export.progress import Report
from latentrt.export.samples import Samples
from latentrt.export.text import BakedText
from latentrt.export.weight_set import StoredWeight
from latentrt.identity import CheckpointDigests
from latentrt.preflight import Order
from latentrt.runtime import smoke_test
from latentrt.runtime.bundle import writer
from latentrt.runtime.bundle.manifest import (
    FORMAT_VERSION,
    EndToken,
    EngineFiles,
    FileRef,
    Kernel,
    Manifest,
    Target,
    Text,
    WeightSet,
)
from latentrt.runtime.bundle.writer import BundleWriter, finished_bytes, holds


def build(checkpoint: Path | str, out: Path | str, options: BuildOptions = BuildOptions(), quiet: bool = True) -> dict:
    """Builds targets into the bundle at `out`, new or old. Returns a summary for machines.

    Every target is committed as it is finished. Raises BuildError, ConfigError, CheckpointError or BundleError; what was
    committed before stays as it was. After an interruption the same call resumes after the last finished shard.
    """
    return run(preflight.check(checkpoint, out, options), quiet)


def run(order: Order, quiet: bool = True) -> dict:
    """`build` of what has been checked."""
    out, opened, previous, force = order.out, order.checkpoint, order.previous, order.options.force
    chosen = [lowerings.find(spec) for spec in order.specs]
    for lowering in chosen:
        lowering.check(opened.config)
    with Report(quiet) as report:
        for note in opened.notes:
            report.note(note)
        inputs = _Inputs(opened, CheckpointDigests(opened, previous, report), order.samples)
        pending = [x for x in chosen if force or not _is_current(out, previous, inputs, x)]
        if not pending:  # nothing is written, so that a bundle on a read-only disk is as good as any
            return _summary(out, previous, chosen, pending, report)
        if not force:
            _check_replace(out, previous, inputs.digests, pending, opened.config)
        writer.check_folder(out, _needed_bytes(out, opened, pending, previous))
        with writer.open_writer(out, discard_unreadable=force) as opened_writer:
            builder = _Builder(opened_writer, inputs, report, reread=force)
            for lowering in pending:
                builder.add(lowering)
            return _summary(out, opened_writer.previous, chosen, pending, report)


def _check_replace(out: Path, previous: Manifest | None, digests: CheckpointDigests, pending: list[Lowering], config) -> None:
    """A target of the same checkpoint and choices is built anew where the tools changed; anything else needs --force."""
    if previous is None or not pending:
        return
    if previous.checkpoint.digest != digests.info.digest:
        raise BuildError(f"{out}: holds a bundle of another checkpoint ({previous.checkpoint.path}); use --force to replace it")
    for lowering in pending:
        name, old = lowering.spec.target.name, previous.targets.get(lowering.spec.target.name)
        asked = (lowering.spec.precision, lowering.options(), lowering.cache_format, lowering.limits(config).max_context)
        options = old and {k: v for k, v in old.options.items() if k != "calibration"}  # other samples are no other choice
        if old and (old.precision, options, old.cache.format, old.limits.max_context) != asked:
            has = f"{old.precision}, {old.options}, cache {old.cache.format}, context {old.limits.max_context}"
            raise BuildError(f"{out}: has target {name} already ({has}); use --force to replace it")


def _is_current(out: Path, previous: Manifest | None, inputs: "_Inputs", lowering: Lowering) -> bool:
    """Whether the bundle has this very target, and all files are there. Reads the checkpoint only where there is a target."""
    name = lowering.spec.target.name
    same = previous and name in previous.targets and previous.targets[name].built_from == inputs.identity(lowering)
    return bool(same) and all(holds(out, ref) for ref in previous.refs())


def _needed_bytes(out: Path, checkpoint: Checkpoint, pending: list[Lowering], previous: Manifest | None) -> int:
    """What the build will write at most: weight sets that are not there yet, plans that hold them again, and small files."""
    config, sets, engines = checkpoint.config, {}, 0
    for lowering in pending:
        weights = lowering.stored_weights(checkpoint.weights(lowering.rotated))
        weight_format = lowering.weight_format(weights)
        size = sum(weight_set.planned_bytes(weights, weight_format).values())
        sets[_set_key(lowering, weight_format)] = size
        engines += lowering.engine_bytes(config, size)
    known = previous.weight_sets if previous else {}
    new = sum(size for key, size in sets.items() if key not in known)
    return max(0, new - finished_bytes(out)) + engines


def _of_experts(weights: list[Weight], located: Mapping[str, StoredWeight]) -> list[str]:
    """Stored tensors of the routed experts, whose first axis is that of experts."""
    stacked = [weight.name for weight in weights if weight.role in ("gate_up", "down")]
    return [name for weight in stacked for name in located if name in (weight, f"{weight}.scale")]


def _set_key(lowering: Lowering, weight_format) -> str:
    return f"{weight_format.key}.{lowering.gate_up_layout}{'.rotated' if lowering.rotated else ''}"


@dataclass(frozen=True)
class _Inputs:
    """What targets are built from."""

    checkpoint: Checkpoint
    digests: CheckpointDigests
    samples: Samples | None

    @cached_property
    def _tokenizer_digest(self) -> str:
        return self.checkpoint.tokenizer_digest()

    def identity(self, lowering: Lowering) -> str:
        """A digest of all that a target is built from."""
        mine = {"checkpoint": self.digests.info.digest, "tokenizer": self._tokenizer_digest, "version": __version__}
        everything = lowering.identity() | mine | self.calibrated(lowering)
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()

    def calibrated(self, lowering: Lowering) -> dict[str, str]:
        """The calibration's digest, where the target has static scales."""
        static = self.samples and lowering.spec.activations == "static"
        return {"calibration": self.samples.digest} if static else {}


class _Builder:
    """Builds targets of one checkpoint into one bundle; traces each kind of step graph once.

    `reread`: files of the bundle are used again only if their content fits their digests, not just their sizes.
    """

    def __init__(self, writer: BundleWriter, inputs: _Inputs, report: Report, reread: bool):
        self.writer, self.inputs, self.report, self.reread = writer, inputs, report, reread
        self.checkpoint, self.digests, self.samples = inputs.checkpoint, inputs.digests, inputs.samples
        self.family = registry.of(self.checkpoint.config)
        self.traced: dict[tuple, dict] = {}

    def add(self, lowering: Lowering) -> None:
        """Builds one target and commits it."""
        config, name, baked = self.checkpoint.config, lowering.spec.target.name, self._baked_text
        weights = lowering.stored_weights(self.checkpoint.weights(lowering.rotated))
        key, stored, located = self._weights(lowering, weights)
        models, stage = self._trace(lowering), self.report.stage
        with tempfile.TemporaryDirectory(dir=self.writer.building) as scratch:
            scales = self.activation_scales if lowering.spec.activations == "static" else None
            given = located, self.writer.folder, Path(scratch), stage, scales
            lowered = lowering.lower(models, config, weights, *given)
            target = self._target(lowering, lowered, key, _of_experts(weights, located))
        text = self._text(baked)
        manifest = self._manifest(text, {key: stored}, {name: target})
        if lowering.executes:
            with self.report.stage("smoke test"):
                executed = smoke_test.run(self.writer.preview(manifest), name)
                manifest = self._manifest(text, {key: stored}, {name: target.model_copy(update={"executed": executed})})
        with self.report.stage("commit"):
            self.writer.commit(manifest)

    @cached_property
    def activation_scales(self) -> dict[str, float]:
        """Static scales, the same for all targets that have them."""
        with self.report.stage("calibration", self.checkpoint.config.num_hidden_layers) as advance:
            return calibrations.activation_scales(self.checkpoint, self.samples, advance)

    @cached_property
    def _baked_text(self) -> BakedText:
        with self.report.stage("tokenizer", shown=False):
            config = self.checkpoint.config
            with self.checkpoint.text_folder() as folder:
                return texts.bake(folder, config.eos_token_id, config.vocab_size)

    def _text(self, baked: BakedText) -> Text:
        """The record of the baked text; its files are written into the bundle."""

        def keep(suffix: str, content: str) -> FileRef:
            return self.writer.add(suffix, lambda draft: draft.write_bytes(content.encode(errors="surrogatepass")))

        return Text(
            tokenizer=keep(".json", baked.tokenizer) if baked.tokenizer else None, source=baked.source,
            vocab_size=baked.vocab_size, special_tokens=baked.special_tokens,
            templates={name: keep(".jinja", template) for name, template in baked.templates.items()},
            end_of_text=[EndToken(id=end.id, token=end.token, sources=list(end.sources)) for end in baked.end_of_text],
            sampling=baked.sampling, ignored=list(baked.ignored),
        )  # fmt: skip

    def _weights(self, lowering: Lowering, weights) -> tuple[str, WeightSet, dict[str, StoredWeight]]:
        """The weight set, its key, and where its tensors lie: written now, or in the bundle already."""
        weight_format = lowering.weight_format(weights)
        key, previous = _set_key(lowering, weight_format), self.writer.previous
        if previous and previous.checkpoint.digest == self.digests.info.digest and previous.weight_sets.get(key):
            found = previous.weight_sets[key]
            located = {name: StoredWeight.of(**t.model_dump()) for name, t in found.tensors.items()}
            if located and all(self.writer.holds(ref, self.reread) for ref in found.files):
                return key, found, located
        size = sum(weight_set.planned_bytes(weights, weight_format).values())
        with self.digests.beside(size) as pace, self.report.stage("weights", size, unit="bytes") as advance:
            located = weight_set.write(
                self.checkpoint, weights, weight_format, f"{self.digests.identity}/{key}", self.writer,
                lambda part, size: (advance(size), pace(size)),
            )  # fmt: skip
        files = [self.writer.ref(f) for f in dict.fromkeys(w.file for w in located.values())]
        stored = WeightSet(
            format=weight_format.description(), gate_up_layout=lowering.gate_up_layout, rotated=lowering.rotated,
            files=files,
            tensors={k: w.record() for k, w in located.items()},
        )  # fmt: skip
        return key, stored, located

    def _trace(self, lowering: Lowering) -> dict:
        """The step graphs that the lowering wants, by form; its own copies."""
        kind = {"dtype": lowering.dtype, "cache_format": lowering.cache_format, "page_size": lowering.page_size,
                "forms": lowering.spec.forms, "ranks": lowering.spec.ranks}  # fmt: skip
        key = tuple(kind.values())
        if key not in self.traced:
            with self.report.stage("export graph (torch -> ONNX)"):
                self.traced[key] = step_graphs.build_forms(self.checkpoint.config, **kind)
        return {form: model.clone() for form, model in self.traced[key].items()}

    def _target(self, lowering: Lowering, lowered: Lowered, weight_set_key: str, experts: list[str]) -> Target:
        row, spec = lowering.spec.target, lowering.spec
        return Target(
            backend=row.backend, backend_version=lowering.backend_version, compute_capability=row.compute_capability,
            precision=spec.precision, options=lowering.options() | self.inputs.calibrated(lowering),
            engines={form: self._engine(engine) for form, engine in lowered.engines.items()}, weight_set=weight_set_key,
            kernels=[self._kernel(kernel) for kernel in lowered.kernels], weight_inputs=lowered.weight_inputs,
            inputs=described(lowered.inputs), outputs=described(lowered.outputs), limits=lowered.limits, ranks=spec.ranks,
            shared_weights=experts if spec.ranks > 1 else [],
            cache=lowering.cache(self.checkpoint.config), built_from=self.inputs.identity(lowering), executed=None,
        )  # fmt: skip

    def _engine(self, engine: LoweredEngine) -> EngineFiles:
        """The record of an engine; its files are moved into the bundle."""
        files = {"graph": engine.graph, "onnx": engine.onnx, "network": engine.network, "native": engine.native}
        moved: dict[str, FileRef | None] = {name: file and self.writer.move(file) for name, file in files.items()}
        return EngineFiles(**moved, profiles=engine.profiles)

    def _kernel(self, kernel) -> Kernel:
        copy = self.writer.copy
        return Kernel(
            op=kernel.spec.op, function=kernel.spec.function, cubin=copy(kernel.path), manifest=copy(kernel.manifest)
        )

    def _manifest(self, text: Text, sets: dict[str, WeightSet], new: dict[str, Target]) -> Manifest:
        """The new manifest: targets and weight sets of the same checkpoint are kept beside the new ones."""
        previous = self.writer.previous
        kept = previous if previous and previous.checkpoint.digest == self.digests.info.digest else None
        now = datetime.now(UTC).isoformat(timespec="seconds")
        all_targets, all_sets = (kept.targets if kept else {}) | new, (kept.weight_sets if kept else {}) | sets
        used = {t.weight_set for t in all_targets.values()}
        return Manifest(
            format_version=FORMAT_VERSION, producer=f"latentrt {__version__}", created=now, family=self.family.model_type,
            config=self.checkpoint.config.model_dump(), checkpoint=self.digests.info, text=text,
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
    common = {"bundle": str(out), "bytes": size, "checkpoint": manifest.checkpoint.digest}
    common |= {"seconds": report.seconds, "notes": report.notes}
    return common | entries[0] | {"targets": entries}
