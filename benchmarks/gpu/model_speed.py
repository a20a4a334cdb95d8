"""The torch backend's speed: a V2-Lite-sized model with random weights, decoding and prompt chunks in both forms."""

import json
import time

import numpy as np
import torch

from benchmarks.gpu import model as example
from benchmarks.gpu.run import Run, timed
from latentrt.plugins.step_graph import DECODE_FORM, FORMS

CONTEXT, PREFIX = 1024, 30720  # tokens in the cache: of a decoding sequence, and before a later chunk


def measure(run: Run) -> None:
    """Decode at 1 to 128 sequences of 1K tokens, random weights made on the device; transformers in the same section."""
    from latentrt.export.models.deepseek_v2.config import parse

    raw = _raw_config(run)
    config = parse(raw)
    sizes = (2,) if run.dry else (1, 2, 4, 8, 16, 32, 64, 128)
    for precision in example.precisions(run)[: 1 if run.dry else None]:
        start = time.monotonic()
        models = example.graphs(config, precision)
        if run.device.type == "cuda" and 1.1 * declared_bytes(models[DECODE_FORM]) > run.free_bytes():
            run.skip(f"V2-Lite {precision}", "the weights do not fit into this GPU's memory")
            continue
        weights = random_weights(run, models[DECODE_FORM])
        steps = example.runner(run, models, weights, config, 1 + max(sizes) * (CONTEXT // 64 + 1), sizes=sizes)
        for program in steps.programs.values():
            example.check_groups(run, f"V2-Lite {precision}", program, config, precision)
        for cache in steps.caches.values():
            cache.normal_()
        run.measure(f"V2-Lite {precision} loaded", seconds=time.monotonic() - start, weights_GB=_bytes(weights.values()) / 1e9)
        for size in sizes:
            if not run.late(f"V2-Lite {precision}, batch {size}"):
                _measure_one(run, steps, config, weights, precision, size)
        for past in (0, 64 if run.dry else PREFIX):
            _measure_prefill(run, steps, config, precision, past)
        del steps, weights
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
    if not run.late("transformers"):
        try:
            _transformers(run, raw)
        except Exception as error:  # a baseline
            run.skip("transformers", f"{type(error).__name__}: {error}")


def declared(model) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shape and dtype of every weight input of `model`."""
    from latentrt.runtime.backends.torch.ops import DTYPES

    kinds = {i.name: i.type.tensor_type for i in model.graph.input if i.name.startswith(("model.", "lm_head"))}
    return {name: ([d.dim_value for d in k.shape.dim], DTYPES[k.elem_type]) for name, k in kinds.items()}


def declared_bytes(model) -> int:
    return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in declared(model).values())


def random_weights(run: Run, model) -> dict[str, torch.Tensor]:
    """Every weight input of `model`, made on the device: sizes that keep activations finite."""
    found = {}
    for name, (shape, dtype) in declared(model).items():
        tensor = torch.empty(shape, dtype=dtype, device=run.device)
        if name.endswith(".scale"):
            tensor.fill_(0.02 / 4.6 if tensor.dim() == 3 else 1.0 / 448 * 0.1)  # blocks of int4; -8 .. 7 deviate by 4.6
        elif dtype == torch.int8:
            tensor.random_(-128, 128)
        elif dtype == torch.float8_e4m3fn:
            tensor.view(torch.uint8).random_(0, 0x78)  # positive, finite
            tensor.view(torch.uint8).bitwise_or_(torch.randint_like(tensor.view(torch.uint8), 2) << 7)
        elif "norm" in name:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0, 0.02)
        found[name] = tensor
    return found


def _bytes(tensors) -> int:
    return sum(t.nbytes for t in tensors)


def _measure_one(run: Run, steps, config, weights: dict, precision: str, size: int) -> None:
    """Device time of a captured step, and a whole step with its logits on the host."""
    from latentrt.runtime.backends.base import SequenceRows, pack

    context = 64 if run.dry else CONTEXT
    table = np.arange(1, 1 + size * (context // 64 + 1)).reshape(size, -1)
    batch = pack([SequenceRows([7 + i], context, [0]) for i in range(size)], table)
    logits = steps.step(batch).logits()
    run.check(f"V2-Lite {precision}, batch {size}: logits that are not numbers", float((~np.isfinite(logits)).sum()), 0)
    captured = steps.captured(batch) if steps.capture else None
    if steps.capture:
        run.check(f"V2-Lite {precision}, batch {size}: CUDA graph", float(not captured), 0, steps.uncaptured[:300])
    step = captured.graph.replay if captured else lambda: steps.step(batch).logits()
    seconds = timed(run, {"step": step}, capture=False)["step"]
    start = time.perf_counter()
    for _ in range(1 if run.dry else 10):
        steps.step(batch).logits()
    wall = (time.perf_counter() - start) / (1 if run.dry else 10)
    read = touched(config, weights, size) + size * context * config.num_hidden_layers * 2 * 576
    run.measure(
        f"V2-Lite {precision}, batch {size}, context {context}", tokens_per_s=size / seconds, step_ms=seconds * 1e3,
        with_logits_tokens_per_s=size / wall, of_bandwidth=read / run.bandwidth / seconds,
        of_copy=read / seconds / run.ceilings["copy"], read_GB=read / 1e9,
    )  # fmt: skip


def _measure_prefill(run: Run, steps, config, precision: str, past: int) -> None:
    """One chunk of a prompt in both forms: time of its graph, and whole steps with logits on the host, with and without it.

    Launches from Python are part of an eager step's time. `chosen` marks the form that runtime/backends/forms.py takes.
    """
    from latentrt.runtime.backends.base import SequenceRows, pack
    from latentrt.runtime.backends.torch.step import StepRunner

    rows = 16 if run.dry else 2048
    pages = np.arange(1, 1 + -(-(past + rows) // 64))[None]
    batch = pack([SequenceRows(range(rows), past, [rows - 1])], pages)
    choice = steps.chooser
    chosen = choice.form(batch)
    for form in FORMS:
        label = f"V2-Lite {precision}, chunk of {rows} after {past}, {form}"
        if run.late(label):
            continue
        steps.chooser = example.chooser(config, form)
        eager = StepRunner(steps.programs, steps.caches, steps.chooser, capture=False)
        expected = eager.step(batch).logits()
        found = [steps.step(batch).logits() for _ in range(3)][-1]  # eager, captured, replayed
        captured = steps.captured(batch) if steps.capture else None
        if steps.capture:
            run.check(f"{label}: CUDA graph", float(not captured), 0, steps.uncaptured_prompts[:300])
            error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
            run.check(f"{label}: captured against eager", error, 0.05)
        values: dict = {}
        if captured:
            seconds = timed(run, {"chunk": captured.graph.replay}, capture=False)["chunk"]
            values = dict(tokens_per_s=rows / seconds, step_ms=seconds * 1e3,
                          with_logits_tokens_per_s=rows / _wall(run, steps, batch))  # fmt: skip
        run.measure(label, **values, eager_tokens_per_s=rows / _wall(run, eager, batch), chosen=form == chosen)
    steps.chooser = choice


def _wall(run: Run, steps, batch) -> float:
    """Median seconds of a step whose logits go to the host."""
    found = []
    for _ in range(1 if run.dry else 7):
        start = time.perf_counter()
        steps.step(batch).logits()
        found.append(time.perf_counter() - start)
    return float(np.median(found))


def touched(config, weights: dict, tokens: int) -> float:
    """Bytes of weights that a step of `tokens` rows reads, if routing is even: all but the embedding and idle experts."""
    share = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** tokens
    routed = _bytes(t for n, t in weights.items() if ".mlp.experts." in n)
    rest = _bytes(t for n, t in weights.items() if ".mlp.experts." not in n and "embed_tokens" not in n)
    return rest + share * routed


def _raw_config(run: Run) -> dict:
    path = example.EXAMPLE / "config.json" if run.dry else example.ROOT / "tests" / "configs" / "v2_lite.json"
    return json.loads(path.read_text())


def _transformers(run: Run, config: dict) -> None:
    """transformers' model of the same shape with random bf16 weights: time of a decode step with its own cache."""
    import transformers

    raw = {k: v for k, v in config.items() if k not in ("architectures", "auto_map", "torch_dtype")}
    with torch.device("meta"):
        model = transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(**raw)).to(torch.bfloat16)
    model = model.to_empty(device=run.device).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_(0, 0.02)
        for size in (2,) if run.dry else (1, 16, 64):
            if not run.late(f"transformers, batch {size}"):
                seconds = _transformers_step(run, model, size)
                run.measure(f"transformers bf16, batch {size}", tokens_per_s=size / seconds, step_ms=seconds * 1e3)


def _transformers_step(run: Run, model, size: int) -> float:
    prompt = torch.randint(0, 1000, (size, 4 if run.dry else 128), device=run.device)
    out = model(prompt, use_cache=True)
    cache, token, times = out.past_key_values, out.logits[:, -1:].argmax(-1), []
    for _ in range(2 if run.dry else 12):
        start = time.perf_counter()
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[len(times) // 4 :]))
