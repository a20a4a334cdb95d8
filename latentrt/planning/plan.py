"""A plan: what a checkpoint or a config alone tells before any work. `plan` gives it for JSON; commands/plan.py prints it."""

from pathlib import Path

from latentrt.errors import UserError
from latentrt.export import targets
from latentrt.export.models import registry
from latentrt.export.models.base import Config
from latentrt.export.quantization import WeightFormat
from latentrt.planning import paper
from latentrt.planning.gpus import GpuRow
from latentrt.planning.roofline import USABLE, Deployment
from latentrt.planning.sizes import Model, formats
from latentrt.plugins import cache_formats

PROMPT = 2048  # tokens of the prompt whose speed is told; shorter where the model's own limit is


def read_config(path: Path) -> Config:
    """The config of a checkpoint's folder, of a GGUF file, or of a config.json alone. No weight is read."""
    if path.is_file() and path.suffix == ".json":
        return registry.parse_file(path, registry.read_file(path))
    if (path / "config.json").is_file():
        return registry.load(path)
    from latentrt.export.checkpoint import Checkpoint

    return Checkpoint(path).config


def plan(config: Config, gpus: list[GpuRow], count: int, context: int | None, cache_format: str) -> dict:
    """Sizes of the model, and a row per GPU with `count` of them. Raises UserError for what cannot be.

    context: tokens of a sequence, the model's own limit by default.
    """
    longest = config.max_position_embeddings
    check_ranks(config, "--gpus", count)
    if context is not None and not 1 <= context <= longest:
        raise UserError(f"--context is {context}, accepted: 1 to {longest} (max_position_embeddings)")
    if cache_format not in cache_formats.NAMES:
        raise UserError(f"--cache-format is {cache_format!r}, accepted: {', '.join(cache_formats.NAMES)}")
    model, context = Model.of(config), context or longest
    parameters = model.parameters
    model.cache_bytes(cache_format)  # refused here where the model's sizes do not fit
    return {
        "model": {
            "layers": config.num_hidden_layers, "max_position_embeddings": longest, "parameters": parameters.total,
            "active_parameters": model.active, "routed_expert_parameters": parameters.routed,
        },
        "weights": {name: _weights(model, f) for name, f in formats(model).items()},
        "caches": {name: _cache(model, name) for name in model.taken_caches()},
        "context": context, "gpu_count": count, "cache_format": cache_format, "usable_memory": USABLE,
        "gpus": [_gpu(model, gpu, count, context, cache_format) for gpu in gpus],
        "ranks": [row for gpu in gpus for row in _ranks(model, gpu, cache_format)],
    }  # fmt: skip


def check_ranks(config: Config, option: str, count: int) -> None:
    """UserError if so many GPUs cannot share the experts."""
    if count < 1:
        raise UserError(f"{option} is {count}, accepted: 1 or more")
    if count > 1 and (accepted := registry.of(config).rank_refusal(config, count)):
        raise UserError(f"{option} is {count}, accepted: {accepted}")


def _weights(model: Model, weight_format: WeightFormat) -> dict:
    size = model.weight_bytes(weight_format)
    return vars(size) | {"total": size.total}


def _cache(model: Model, name: str) -> dict:
    size = model.cache_bytes(name)
    return {"bytes_per_token": size, "bits_per_element": model.cache_bits(name), "saved_of_67b": paper.saved(size)}


def _gpu(model: Model, gpu: GpuRow, count: int, context: int, cache_format: str) -> dict:
    """What `count` GPUs of a kind hold and can do, with the weights that builds for it have."""
    precision = targets.find(gpu.target).precisions[0]
    deployment = Deployment(model, gpu, count, formats(model)[precision], cache_format)
    batch, prompt = deployment.largest_batch(context), min(PROMPT, context)
    row = {
        "name": gpu.name, "target": gpu.target, "precision": precision, "source": gpu.source,
        "weight_bytes_per_gpu": deployment.held, "workspace_bytes_per_gpu": deployment.workspace,
        "fewest_gpus": deployment.fewest(context),
        "cache_tokens": {n: Deployment(model, gpu, count, deployment.weight_format, n).capacity for n in model.taken_caches()},
        "largest_batch": batch, "decode": None, "prefill": None,
    }  # fmt: skip
    if batch:
        steps = {str(n): (n, deployment.decode(n, context)) for n in dict.fromkeys((1, batch))}
        row["decode"] = {
            key: {"tokens_per_second": n / step.seconds, "milliseconds": 1e3 * step.seconds, "bound": step.bound}
            for key, (n, step) in steps.items()
        }
        step = deployment.prefill(prompt)
        speed = count * prompt / step.seconds
        row["prefill"] = {"prompt": prompt, "tokens_per_second": speed, "bound": step.bound}
    return row


def _ranks(model: Model, gpu: GpuRow, cache_format: str) -> list[dict]:
    """A row per weight format that builds for a GPU have: by number of GPUs what each of them holds, and what all have left."""
    rows = []
    for precision in targets.find(gpu.target).precisions:
        one = Deployment(model, gpu, 1, formats(model)[precision], cache_format)
        rows.append({
            "name": gpu.name, "precision": precision, "usable_bytes": one.usable, "replicated_bytes": one.replicated,
            "by_count": {n: _memory(one.on(n)) for n in model.rank_counts},
        })  # fmt: skip
    return rows


def _memory(deployment: Deployment) -> dict:
    """Of each GPU, in bytes, but for the tokens that all caches hold together."""
    return {
        "experts_bytes": deployment.held - deployment.replicated, "workspace_bytes": deployment.workspace,
        "cache_bytes": deployment.left, "cache_tokens": deployment.capacity,
    }  # fmt: skip


def throughput(config: Config, gpu: GpuRow, count: int) -> dict[str, list[tuple[int, float]]]:
    """(context, tokens/s of the largest batch) by cache format: what the plot shows."""
    model = Model.of(config)
    weight_format = formats(model)[targets.find(gpu.target).precisions[0]]
    contexts = [1 << n for n in range(8, 21) if 1 << n <= config.max_position_embeddings]
    found = {}
    for name in model.taken_caches():
        deployment = Deployment(model, gpu, count, weight_format, name)
        batches = [(context, deployment.largest_batch(context)) for context in contexts]
        points = [(context, n / deployment.decode(n, context).seconds) for context, n in batches if n]
        if points:
            found[name] = points
    return found
