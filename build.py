"""Builds a bundle from a checkpoint: `python build.py CHECKPOINT --target cpu --precision int8 --out BUNDLE`."""

import hashlib
import json
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from export import graph as step_graph
from export import targets, weight_set
from export.checkpoint import Checkpoint, combined_digest
from export.errors import BuildError, CheckpointError, ConfigError
from export.lowering import onnxruntime as cpu
from export.models import deepseek_v2
from plugins.mla_attention import formats
from runtime.backends.base import SequenceRows, StepBatch
from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.bundle import (
    FORMAT_VERSION,
    BundleError,
    BundleWriter,
    CacheSpec,
    CheckpointInfo,
    Executed,
    Limits,
    Manifest,
    Target,
    TensorInfo,
    WeightSet,
    open_writer,
)  # fmt: skip

VERSION = "0.1.0"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
                   "chat_template.jinja")  # fmt: skip
CPU_PAGE_SIZE = 64


@dataclass(frozen=True)
class Request:
    """What one target is built from; equal requests give equal targets."""

    target: str
    precision: str
    accuracy: str
    cache_format: str
    max_context: int


class _Report:
    """Stages with progress for people (rich, on stderr) or without, and their seconds for --json."""

    def __init__(self, quiet: bool):
        columns = TextColumn("{task.description:32}"), BarColumn(24), TextColumn("{task.percentage:3.0f}%"), TimeElapsedColumn()
        self.progress = Progress(*columns, console=Console(stderr=True), disable=quiet)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: float = 1) -> Iterator[Callable[[float], None]]:
        """Times a stage; yields a function that advances its bar."""
        start, task = time.monotonic(), self.progress.add_task(name, total=total)
        yield lambda amount: self.progress.advance(task, amount)
        self.progress.update(task, completed=total)
        self.seconds[name] = round(time.monotonic() - start, 3)


def build(
    checkpoint_path: Path, out: Path, target: str = "cpu", precision: str = "auto", accuracy: str = "fast",
    cache_format: str = "float32", max_context: int | None = None, force: bool = False, quiet: bool = True,
) -> dict:
    """Builds one target into the bundle at `out`, new or old. Returns a summary for machines.

    Raises BuildError, ConfigError, CheckpointError or BundleError; a bundle that was there before stays as it was. After
    an interruption the same call goes on behind the last finished shard.
    """
    row = targets.find(target)
    precision = targets.precision(row, precision)
    options = cpu.CpuOptions(precision, accuracy if precision == "int8" else "exact", cache_format)
    request = Request(row.name, precision, options.accuracy, cache_format, max_context or 0)
    options.check()
    report = _Report(quiet)
    with report.progress:
        with report.stage("read checkpoint headers"):
            checkpoint = Checkpoint(checkpoint_path)
            checkpoint.check(deepseek_v2.checkpoint_tensors(checkpoint.config))
            _check_context(checkpoint, max_context)
        with open_writer(Path(out), discard_unreadable=force) as writer:
            info = _checkpoint_info(checkpoint, writer.previous, report)
            key = _request_key(request, info.digest)
            if _is_current(writer.previous, target, key) and not force:
                return _summary(out, writer.previous, target, report, built=False)
            _check_replace(out, writer.previous, info, target, force)
            manifest = _build_target(writer, checkpoint, info, request, options, key, report)
    return _summary(out, manifest, target, report, built=True)


def _is_current(previous: Manifest | None, target: str, key: str) -> bool:
    return previous is not None and target in previous.targets and previous.targets[target].request == key


def _check_context(checkpoint: Checkpoint, max_context: int | None) -> None:
    longest = checkpoint.config.max_position_embeddings
    if max_context is not None and not 1 <= max_context <= longest:
        raise BuildError(f"max_context is {max_context}, accepted: 1 to {longest} (max_position_embeddings)")


def _checkpoint_info(checkpoint: Checkpoint, previous: Manifest | None, report: _Report) -> CheckpointInfo:
    known = {k: v.model_dump() for k, v in previous.checkpoint.files.items()} if previous else {}
    with report.stage("checkpoint digest", sum(f.stat().st_size for f in checkpoint.files)) as advance:
        digests = checkpoint.file_digests(known, advance)
    return CheckpointInfo(path=str(checkpoint.path.resolve()), digest=combined_digest(digests), files=digests)


def _request_key(request: Request, checkpoint_digest: str) -> str:
    import onnxruntime

    content = asdict(request) | {"checkpoint": checkpoint_digest, "version": VERSION, "onnxruntime": onnxruntime.__version__}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_replace(out: Path, previous: Manifest | None, info: CheckpointInfo, target: str, force: bool) -> None:
    if previous is None or force:
        return
    if previous.checkpoint.digest != info.digest:
        raise BuildError(f"{out}: holds a bundle of another checkpoint ({previous.checkpoint.path}); use --force to replace it")
    if target in previous.targets:
        old = previous.targets[target]
        raise BuildError(f"{out}: has target {target} already ({old.precision}, {old.options}); use --force to replace it")


def _build_target(writer: BundleWriter, checkpoint, info, request: Request, options, key: str, report) -> Manifest:
    import onnxruntime

    config = checkpoint.config
    weights = cpu.stored_weights(deepseek_v2.weights(config))
    weight_format = cpu.weight_format(config, options)
    set_key = f"{weight_format.key}.{cpu.LAYOUT}.none"
    with report.stage("weights", len(weight_set.parts(weights))) as advance:
        located = weight_set.write(
            checkpoint, weights, weight_format, f"{info.digest[:16]}/{set_key}", writer, lambda part, size: advance(1)
        )
    with report.stage("export graph (torch -> ONNX)"):
        model = step_graph.build(config, cache_format=options.cache_format, page_size=CPU_PAGE_SIZE)
    with report.stage("lower to ONNX Runtime"):
        inputs, outputs = _tensors(model, weights)
        proto = cpu.lower(model, config, weights, located, weight_format, options)
        graph = writer.add(".onnx", lambda path: path.write_bytes(proto.SerializeToString()))
    with report.stage("tokenizer"):
        tokenizer = _copy_tokenizer(writer, checkpoint.path)
    files = [writer.ref(f) for f in dict.fromkeys(w.file for w in located.values())]
    target = Target(
        backend="onnxruntime", backend_version=onnxruntime.__version__, compute_capability=None,
        precision=options.precision, options={"accuracy": options.accuracy}, graph=graph, weight_set=set_key, kernels=[],
        inputs=inputs, outputs=outputs, cache=_cache_spec(config, options.cache_format),
        limits=Limits(
            max_context=request.max_context or config.max_position_embeddings, max_batch_tokens=2048, max_sequences=256
        ),
        request=key, executed=None,
    )  # fmt: skip
    with report.stage("first step"):
        target = target.model_copy(update={"executed": _execute(writer, request.target, target)})
    with report.stage("commit"):
        sets = {set_key: WeightSet(precision=options.precision, layout=cpu.LAYOUT, cache_transform="none", files=files)}
        manifest = _manifest(info, config, tokenizer, sets, {request.target: target}, writer.previous)
        writer.commit(manifest)
    return manifest


def _execute(writer: BundleWriter, name: str, target: Target) -> Executed:
    """Loads the target and runs one token: a bundle that does not run here is not committed."""
    backend = OnnxRuntimeBackend(writer, name, target, cache_tokens=1)
    logits = backend.step(StepBatch.of([SequenceRows([0], 0, [0])], np.array([[1]])))
    if not np.isfinite(logits).all():
        raise BuildError(f"target {name}: the first step's logits are not finite; the checkpoint's weights overflow float32")
    return Executed(machine=f"{platform.machine()}, {platform.node()}", date=datetime.now(UTC).isoformat(timespec="seconds"))


def _manifest(info, config, tokenizer, sets, new_targets, previous: Manifest | None) -> Manifest:
    """The new manifest: targets and weight sets of the same checkpoint are kept beside the new ones."""
    kept = previous if previous and previous.checkpoint.digest == info.digest else None
    all_targets = (kept.targets if kept else {}) | new_targets
    all_sets = (kept.weight_sets if kept else {}) | sets
    used = {t.weight_set for t in all_targets.values()}
    return Manifest(
        format_version=FORMAT_VERSION, producer=f"latentrt {VERSION}", created=datetime.now(UTC).isoformat(timespec="seconds"),
        architecture="DeepseekV2ForCausalLM", config=config.model_dump(), checkpoint=info, tokenizer=tokenizer,
        weight_sets={k: s for k, s in all_sets.items() if k in used}, targets=all_targets,
    )  # fmt: skip


def _tensors(model, weights) -> tuple[list[TensorInfo], list[TensorInfo]]:
    names = {w.name for w in weights}

    def info(value) -> TensorInfo:
        shape = [d if isinstance(d, int) else str(d.value) for d in value.shape]
        return TensorInfo(name=value.name, dtype=value.dtype.name.lower(), shape=shape)

    return [info(v) for v in model.graph.inputs if v.name not in names], [info(v) for v in model.graph.outputs]


def _cache_spec(config, cache_format: str) -> CacheSpec:
    layout = formats.get(cache_format)
    sizes = config.kv_lora_rank, config.qk_rope_head_dim
    return CacheSpec(
        format=cache_format, dtype=str(layout.dtype).removeprefix("torch."), page_size=CPU_PAGE_SIZE,
        width=layout.width(*sizes), layers=config.num_hidden_layers,
        bytes_per_token=layout.bytes_per_token(*sizes) * config.num_hidden_layers,
    )  # fmt: skip


def _copy_tokenizer(writer: BundleWriter, folder: Path) -> dict:
    found = {}
    for name in TOKENIZER_FILES:
        source = folder / name
        if source.is_file():
            suffix = ".jinja" if name.endswith(".jinja") else ".json"
            found[name] = writer.add(suffix, lambda path, source=source: shutil.copyfile(source, path))
    return found


def _summary(out: Path, manifest: Manifest, target: str, report: _Report, built: bool) -> dict:
    entry = manifest.targets[target]
    size = sum(ref.size for ref in set(manifest.refs()))
    return {
        "bundle": str(out), "target": target, "precision": entry.precision, "built": built, "bytes": size,
        "backend": entry.backend, "backend_version": entry.backend_version, "checkpoint": manifest.checkpoint.digest,
        "seconds": report.seconds,
    }  # fmt: skip


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a Hugging Face DeepSeek-V2 checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle.")],
    target: Annotated[str, typer.Option(help=f"One of: {', '.join(targets.TARGETS)}.")] = "cpu",
    precision: Annotated[str, typer.Option(help="auto, fp32 or int8.")] = "auto",
    accuracy: Annotated[str, typer.Option(help="int8 products: exact (float32 sums) or fast (int8 activations).")] = "fast",
    cache_format: Annotated[str, typer.Option(help="Latent cache: float32 or float16.")] = "float32",
    max_context: Annotated[int | None, typer.Option(help="Longest sequence; the model's own limit by default.")] = None,
    force: Annotated[bool, typer.Option(help="Replace a target, or a bundle of another checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, no progress.")] = False,
) -> None:
    """Builds an engine bundle for a target from a DeepSeek-V2-family checkpoint."""
    try:
        summary = build(checkpoint, out, target, precision, accuracy, cache_format, max_context, force, quiet=as_json)
    except (BuildError, ConfigError, CheckpointError, BundleError) as error:
        if as_json:
            print(json.dumps({"error": str(error), "kind": type(error).__name__}))
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command goes on behind the last finished shard")
        sys.exit(130)
    if as_json:
        print(json.dumps(summary))
        return
    verb = "built" if summary["built"] else "is up to date:"
    print(f"{out} {verb} target {target}, {summary['precision']}, {summary['bytes'] / 1e6:.1f} MB")


if __name__ == "__main__":
    typer.run(main)
