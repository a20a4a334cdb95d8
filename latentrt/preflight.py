"""What a build is asked for, checked by its options, the checkpoint's headers and small files.

No torch, no ONNX: what is refused is refused in less than a second, before the imports that a build needs.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from latentrt.export import lowering as lowerings
from latentrt.export import recipe, samples
from latentrt.export import text as texts
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.errors import BuildError
from latentrt.export.options import BuildOptions, TargetSpec
from latentrt.export.samples import Samples
from latentrt.runtime.bundle import writer
from latentrt.runtime.bundle.manifest import Manifest


@dataclass(frozen=True)
class Order:
    """A build that may begin. `previous` is the manifest in force at `out`."""

    checkpoint: Checkpoint
    out: Path
    options: BuildOptions
    specs: list[TargetSpec]
    samples: Samples | None
    previous: Manifest | None


def check(checkpoint: Path | str, out: Path | str, options: BuildOptions = BuildOptions()) -> Order:
    """Opens the checkpoint. Raises BuildError, ConfigError, CheckpointError or BundleError."""
    out, specs = Path(out), options.specs()
    for spec in specs:
        lowerings.check(spec)
    opened = Checkpoint(checkpoint)
    opened.check()
    _check_context(opened, options.max_context)
    specs = _with_recipe(specs, options.recipe, opened)
    previous = writer.previous_manifest(out, discard_unreadable=options.force)
    if previous is None or options.force:  # else it may be up to date, and nothing is written
        writer.check_folder(out)
    with opened.text_folder() as folder:
        texts.check(folder)
    read = samples.read_samples(options.calibration, opened) if options.calibration else None
    return Order(opened, out, options, specs, read, previous)


def _with_recipe(specs: list[TargetSpec], file: Path | None, checkpoint: Checkpoint) -> list[TargetSpec]:
    """The specifications with the modules that the recipe leaves plain, each in its precision."""
    if file is None:
        return specs
    found = recipe.read(file).modules(checkpoint.weights(), {spec.precision: None for spec in specs})
    return [replace(spec, plain_modules=found[spec.precision]) for spec in specs]


def _check_context(checkpoint: Checkpoint, max_context: int | None) -> None:
    longest = checkpoint.config.max_position_embeddings
    if max_context is not None and not 1 <= max_context <= longest:
        raise BuildError(f"max_context is {max_context}, accepted: 1 to {longest} (max_position_embeddings)")
