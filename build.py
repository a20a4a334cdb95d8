"""Builds a bundle from a checkpoint: `python build.py CHECKPOINT --target sm89,sm120 --precision fp8 --out BUNDLE`."""

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated

from runtime import interrupt

with interrupt.leaves_at_once():
    import typer
    from rich.console import Console
    from rich.markup import escape

    from export import calibration as calibrations
    from export import graph as step_graph
    from export import lowering as lowerings
    from export import targets, weight_set
    from export.calibration import Samples
    from export.checkpoint import Checkpoint, combined_digest
    from export.errors import BuildError, CheckpointError, ConfigError
    from export.lowering.base import Engine, Lowered, Lowering, Request, described
    from export.models.deepseek_v2_weights import checkpoint_tensors
    from export.models.deepseek_v2_weights import weights as model_weights
    from export.progress import Report
    from export.weight_set import StoredWeight
    from runtime.bundle import BundleError, BundleWriter, open_writer
    from runtime.first_step import check_tokenizer, execute
    from runtime.manifest import FORMAT_VERSION, CheckpointInfo, FileRef, Manifest, Target, WeightSet

VERSION = "0.1.0"


def build(
    checkpoint_path: Path, out: Path, target: str = "cpu", precision: str = "auto", accuracy: str = "fast",
    cache_format: str = "auto", max_context: int | None = None, force: bool = False, quiet: bool = True,
    weights: str = "inputs", activations: str = "dynamic", calibration: Path | None = None, prefill: str = "auto",
) -> dict:
    """Builds targets ("cpu", or several: "sm86,sm89") into the bundle at `out`, new or old. Returns a summary for machines.

    Every target is committed as it is finished. Raises BuildError, ConfigError, CheckpointError or BundleError; what was
    committed before stays as it was. After an interruption the same call goes on behind the last finished shard.
    """
    rows = [targets.find(name) for name in dict.fromkeys(n.strip() for n in target.split(","))]
    precisions = {row.name: targets.precision(row, precision) for row in rows}
    asked = {"accuracy": accuracy, "weights": weights, "activations": activations, "prefill": prefill}
    targets.check_choices(precisions, asked, calibrated=calibration is not None)
    chosen = [_lowering(row, precisions[row.name], asked, cache_format, max_context) for row in rows]
    with Report(quiet) as report:
        with report.stage("read checkpoint headers", shown=False):
            checkpoint = Checkpoint(checkpoint_path)
            checkpoint.check(checkpoint_tensors(checkpoint.config))
            check_tokenizer(checkpoint.path, checkpoint.tokenizer_files, checkpoint.config.model_dump())
            _check_context(checkpoint, max_context)
            samples = calibrations.read_samples(calibration, checkpoint) if calibration else None
        with open_writer(Path(out), discard_unreadable=force) as writer:
            info = _checkpoint_info(checkpoint, writer.previous, report)
            identity = {"checkpoint": info.digest, "tokenizer": checkpoint.tokenizer_digest(), "version": VERSION}
            keys = {x.request.target.name: _request_key(x, identity | _calibrated(x, samples)) for x in chosen}
            pending = [x for x in chosen if force or not _is_current(writer, x.request.target.name, keys)]
            _check_replace(out, writer.previous, info, [] if force else pending, checkpoint.config)
            builder = _Builder(writer, checkpoint, info, report, samples, reread=force)
            for lowering in pending:
                builder.add(lowering, keys[lowering.request.target.name])
            return _summary(out, writer.previous, chosen, pending, report)


def _lowering(row: targets.BuildTarget, precision: str, asked: Mapping[str, str], cache_format: str, max_context) -> Lowering:
    choices = targets.choices(row, precision, asked)
    return lowerings.find(Request(row, precision, cache_format=cache_format, max_context=max_context or 0, **choices))


def _is_current(writer: BundleWriter, target: str, keys: Mapping[str, str]) -> bool:
    """Whether the bundle has this very target, and all files are there."""
    manifest = writer.previous
    same = manifest is not None and target in manifest.targets and manifest.targets[target].request == keys[target]
    return same and all(map(writer.holds, manifest.refs()))


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


def _request_key(lowering: Lowering, identity: dict) -> str:
    return hashlib.sha256(json.dumps(lowering.request_identity() | identity, sort_keys=True).encode()).hexdigest()


def _check_replace(out: Path, previous: Manifest | None, info: CheckpointInfo, pending: list[Lowering], config) -> None:
    """A target of the same checkpoint and choices is built anew where the tools changed; anything else needs --force."""
    if previous is None or not pending:
        return
    if previous.checkpoint.digest != info.digest:
        raise BuildError(f"{out}: holds a bundle of another checkpoint ({previous.checkpoint.path}); use --force to replace it")
    for lowering in pending:
        request, old = lowering.request, previous.targets.get(lowering.request.target.name)
        asked = (request.precision, lowering.options(), lowering.cache_format, lowering.limits(config).max_context)
        options = old and {k: v for k, v in old.options.items() if k != "calibration"}  # other samples are no other choice
        if old and (old.precision, options, old.cache.format, old.limits.max_context) != asked:
            has = f"{old.precision}, {old.options}, cache {old.cache.format}, context {old.limits.max_context}"
            raise BuildError(f"{out}: has target {request.target.name} already ({has}); use --force to replace it")


class _Builder:
    """Builds targets of one checkpoint into one bundle; traces each kind of step graph once.

    `reread`: files of the bundle are used again only if their content fits their digests, not just their sizes.
    """

    def __init__(self, writer: BundleWriter, checkpoint: Checkpoint, info: CheckpointInfo, report, samples, reread: bool):
        self.writer, self.checkpoint, self.info, self.report, self.samples = writer, checkpoint, info, report, samples
        self.reread = reread
        self.traced: dict[tuple, dict] = {}

    def add(self, lowering: Lowering, key: str) -> None:
        """Builds one target and commits it."""
        config, name = self.checkpoint.config, lowering.request.target.name
        weights = lowering.stored_weights(model_weights(config))
        set_key, located, weight_files = self._weights(lowering, weights)
        models, stage = self._trace(lowering), self.report.stage
        with tempfile.TemporaryDirectory(dir=self.writer.building) as scratch:
            scales = self.activation_scales if _static(lowering) else None
            given = located, self.writer.folder, Path(scratch), stage, scales
            lowered = lowering.lower(models, config, weights, *given)
            target = self._target(lowering, lowered, set_key, key)
        with self.report.stage("tokenizer"):
            tokenizer = {f.name: self.writer.copy(f) for f in self.checkpoint.tokenizer_files}
        if lowering.executes:
            with self.report.stage("first step"):
                target = target.model_copy(update={"executed": execute(self.writer, name, target)})
        with self.report.stage("commit"):
            stored = WeightSet(
                precision=lowering.request.precision, layout=lowering.layout, cache_transform="none", files=weight_files,
                tensors={k: w.record() for k, w in located.items()},
            )  # fmt: skip
            self.writer.commit(self._manifest(tokenizer, {set_key: stored}, {name: target}))

    @cached_property
    def activation_scales(self) -> dict[str, float]:
        """Static scales, the same for all targets that have them."""
        with self.report.stage("calibration", self.checkpoint.config.num_hidden_layers) as advance:
            return calibrations.activation_scales(self.checkpoint, self.samples, advance)

    def _weights(self, lowering: Lowering, weights) -> tuple[str, dict[str, StoredWeight], list[FileRef]]:
        """The weight set's key, where its tensors lie, and its files: written now, or in the bundle already."""
        weight_format = lowering.weight_format(self.checkpoint.config)
        key, previous = f"{weight_format.key}.{lowering.layout}.none", self.writer.previous
        if previous and previous.checkpoint.digest == self.info.digest and previous.weight_sets.get(key):
            found = previous.weight_sets[key]
            located = {name: StoredWeight.of(**t.model_dump()) for name, t in found.tensors.items()}
            if located and all(self.writer.holds(ref, self.reread) for ref in found.files):
                return key, located, found.files
        with self.report.stage("weights", len(weight_set.parts(weights))) as advance:
            located = weight_set.write(
                self.checkpoint, weights, weight_format, f"{self.info.digest[:16]}/{key}", self.writer,
                lambda part, size: advance(1),
            )  # fmt: skip
        return key, located, [self.writer.ref(f) for f in dict.fromkeys(w.file for w in located.values())]

    def _trace(self, lowering: Lowering) -> dict:
        """The step graphs that the lowering wants, by form; its own copies."""
        kind = {"dtype": lowering.dtype, "cache_format": lowering.cache_format, "page_size": lowering.page_size,
                "forms": lowering.forms}  # fmt: skip
        key = tuple(kind.values())
        if key not in self.traced:
            with self.report.stage("export graph (torch -> ONNX)"):
                self.traced[key] = step_graph.build_forms(self.checkpoint.config, **kind)
        return {form: model.clone() for form, model in self.traced[key].items()}

    def _target(self, lowering: Lowering, lowered: Lowered, set_key: str, key: str) -> Target:
        row, copy = lowering.request.target, self.writer.copy
        expanded = lowered.expanded and self._engine(lowered.expanded)
        kernels = [{"op": k.op, "function": k.function, "cubin": copy(k.cubin), "manifest": copy(k.manifest)}
                   for k in lowered.kernels]  # fmt: skip
        return Target(
            backend=row.backend, backend_version=lowering.backend_version, compute_capability=row.compute_capability,
            precision=lowering.request.precision, options=lowering.options() | _calibrated(lowering, self.samples),
            **self._engine(lowered.engine), expanded=expanded, weight_set=set_key, kernels=kernels,
            inputs=described(lowered.inputs), outputs=described(lowered.outputs), weight_inputs=lowered.weight_inputs,
            cache=lowering.cache(self.checkpoint.config), limits=vars(lowered.limits), request=key, executed=None,
        )  # fmt: skip

    def _engine(self, engine: Engine) -> dict:
        """An engine's fields of the manifest; its files are moved into the bundle."""
        files = {"graph": engine.graph, "onnx": engine.onnx, "network": engine.network}
        return {name: file and self.writer.move(file) for name, file in files.items()} | {"profiles": engine.profiles}

    def _manifest(self, tokenizer, sets: dict[str, WeightSet], new: dict[str, Target]) -> Manifest:
        """The new manifest: targets and weight sets of the same checkpoint are kept beside the new ones."""
        previous = self.writer.previous
        kept = previous if previous and previous.checkpoint.digest == self.info.digest else None
        now = datetime.now(UTC).isoformat(timespec="seconds")
        all_targets, all_sets = (kept.targets if kept else {}) | new, (kept.weight_sets if kept else {}) | sets
        used = {t.weight_set for t in all_targets.values()}
        return Manifest(
            format_version=FORMAT_VERSION, producer=f"latentrt {VERSION}", created=now,
            architecture="DeepseekV2ForCausalLM", config=self.checkpoint.config.model_dump(), checkpoint=self.info,
            tokenizer=tokenizer, weight_sets={k: s for k, s in all_sets.items() if k in used}, targets=all_targets,
        )  # fmt: skip


def _static(lowering: Lowering) -> bool:
    return lowering.request.activations == "static"


def _calibrated(lowering: Lowering, samples: Samples | None) -> dict[str, str]:
    return {"calibration": samples.digest} if samples and _static(lowering) else {}


def _summary(out: Path, manifest: Manifest, chosen: list[Lowering], built: list[Lowering], report: Report) -> dict:
    """What --json prints: all targets under "targets", and the first one's fields again at the top."""
    entries = []
    for lowering in chosen:
        name = lowering.request.target.name
        target = manifest.targets[name]
        entries.append({"target": name, "precision": target.precision, "built": lowering in built,
                        "backend": target.backend, "backend_version": target.backend_version})  # fmt: skip
    size = sum(ref.size for ref in set(manifest.refs()))
    common = {"bundle": str(out), "bytes": size, "checkpoint": manifest.checkpoint.digest, "seconds": report.seconds}
    return common | entries[0] | {"targets": entries}


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a Hugging Face DeepSeek-V2 checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle.")],
    target: Annotated[str, typer.Option(help=f"One or more of: {','.join(targets.TARGETS)}.")] = "cpu",
    precision: Annotated[str, typer.Option(help="auto, fp8, bf16, int8 or fp32.")] = "auto",
    accuracy: Annotated[str, typer.Option(help="int8 products: exact (float32 sums) or fast (int8 activations).")] = "fast",
    cache_format: Annotated[str, typer.Option(help="Latent cache: auto, float32 or float16 (cpu), bfloat16 (GPUs).")] = "auto",
    max_context: Annotated[int | None, typer.Option(help="Longest sequence; the model's own limit by default.")] = None,
    weights: Annotated[str, typer.Option(help="GPUs: inputs (shared by targets) or embedded in the plan.")] = "inputs",
    activations: Annotated[str, typer.Option(help="Scales of fp8 activations: dynamic, or static per linear.")] = "dynamic",
    calibration: Annotated[Path | None, typer.Option(help="Sample tokens for static: a text, or JSON lists of ids.")] = None,
    prefill: Annotated[str, typer.Option(help="Prompt chunks on GPUs: expanded (a second plan) or absorbed.")] = "auto",
    force: Annotated[bool, typer.Option(help="Replace a target, or a bundle of another checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, no progress.")] = False,
) -> None:
    """Builds an engine bundle for one or more targets from a DeepSeek-V2-family checkpoint."""
    choices = (target, precision, accuracy, cache_format, max_context, force, as_json, weights, activations, calibration)
    try:
        summary = build(checkpoint, out, *choices, prefill)
    except (BuildError, ConfigError, CheckpointError, BundleError, OSError) as error:
        if as_json:
            print(json.dumps({"error": str(error), "kind": type(error).__name__}))
        Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command goes on behind the last finished shard")
        sys.exit(interrupt.STATUS)
    if as_json:
        print(json.dumps(summary))
        return
    for entry in summary["targets"]:
        verb = "built" if entry["built"] else "is up to date:"
        print(f"{out} {verb} target {entry['target']}, {entry['precision']}, {summary['bytes'] / 1e6:.1f} MB")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
