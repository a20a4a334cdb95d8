"""TensorRT engines end to end: the example model built for this GPU, loaded by the runtime, against the reference."""

import tempfile
from pathlib import Path

import torch

from benchmarks.gpu import engine_cache, model
from benchmarks.gpu.run import Run
from latentrt.plugins.step_graph import FORMS


def check(run: Run) -> None:
    """Builds the example for this GPU in every precision it has, and compares every position's logits. Needs a GPU."""
    from latentrt.export.checkpoint import Checkpoint
    from latentrt.export.errors import BuildError
    from latentrt.export.targets import TARGETS

    if run.device.type != "cuda":
        run.skip("engines", "no GPU")
        return
    major, minor = torch.cuda.get_device_capability(run.device)
    name = f"sm{major}{minor}"
    if name not in TARGETS:
        run.skip("engines", f"no target {name}, only {', '.join(TARGETS)}")
        return
    checkpoint = Checkpoint(model.EXAMPLE)
    texts = model._texts(checkpoint.config.vocab_size, model.LENGTHS)
    reference, expected = model.reference(run, checkpoint, texts)
    for precision in TARGETS[name].precisions:
        if run.late(f"engine {name} {precision}"):
            return
        with tempfile.TemporaryDirectory() as folder:
            try:
                _check_engine(run, Path(folder) / "bundle", name, precision, texts, reference, expected)
            except BuildError as error:  # the package is not there
                run.skip(f"engine {name} {precision}", error)


def _check_engine(run: Run, out: Path, name: str, precision: str, texts, reference: str, expected) -> None:
    from latentrt import builder
    from latentrt.export.checkpoint import Checkpoint
    from latentrt.export.options import BuildOptions
    from latentrt.runtime import backends
    from latentrt.runtime.bundle.reader import Bundle

    summary = builder.build(model.EXAMPLE, out, BuildOptions(name, precision))
    run.measure(f"engine {name} {precision} built", seconds=float(sum(summary["seconds"].values())))
    tokens = sum(map(len, texts)) + 64 * len(texts)
    for attempt, form in (("first load", "expanded"), ("second load", "expanded"), ("third load", "absorbed")):
        backend = backends.load(Bundle(out), name, cache_tokens=tokens, prefill=form)
        label = f"engine {name} {precision}, {form}, {attempt}"
        found = model.teacher_forced(backend.step, texts)
        model.compare(run, f"{label} against {reference}", found, expected, model.LIMITS[precision])
        run.measure(label, **{k: v for k, v in backend.load_seconds.items()})
        backend.close()
    engine_cache.check(run, f"engine {name} {precision}", Bundle(out), name)
    config = Checkpoint(model.EXAMPLE).config
    for form in FORMS:
        label = f"torch backend on {name} {precision} bundle, {form}"
        steps = backends.load(Bundle(out), name, backend="torch", cache_tokens=tokens, prefill=form)
        model.check_groups(run, label, steps.runner.programs[form], config, precision)
        model.compare(run, label, model.teacher_forced(steps.step, texts), expected, model.LIMITS[precision])
