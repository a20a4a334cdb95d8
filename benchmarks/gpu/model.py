"""The torch backend: the example model against transformers in float32, and a V2-Lite-sized model's speed."""

import json
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu.run import HBM, Run, timed

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "tiny-deepseek-v2"
LIMITS = {"bf16": 0.05, "fp8": 0.15}  # median relative error of a row of logits, five layers
LENGTHS, DRY_LENGTHS = (97, 5, 64, 130), (9, 6)
CONTEXT = 1024


def graph(config, precision: str, weights=None):
    """The step graph as the TensorRT lowering writes it (weights as inputs), as an ONNX model."""
    import onnx_ir as ir

    from export import graph as step_graph
    from export.lowering.tensorrt import prepare
    from export.models import deepseek_v2
    from export.quantization import BFloat16, Fp8

    model = step_graph.build(config, torch.bfloat16, "bfloat16")
    prepare(model, weights or deepseek_v2.weights(config), Fp8() if precision == "fp8" else BFloat16())
    return ir.to_proto(model)


def runner(run: Run, model, weights: dict, config, num_pages: int, **options):
    """A StepRunner with a latent cache full of NaN."""
    from runtime.backends.torch_graph import StepProgram
    from runtime.backends.torch_step import StepRunner

    program = StepProgram(model, weights, run.device, "triton")
    shape = (num_pages, 64, config.kv_lora_rank + config.qk_rope_head_dim)
    caches = {
        f"latent_cache.{i}": torch.full(shape, float("nan"), dtype=torch.bfloat16, device=run.device)
        for i in range(config.num_hidden_layers)
    }
    return StepRunner(program, caches, **options)


def precisions(run: Run) -> list[str]:
    """bf16, and fp8 where the GPU has it."""
    if run.device.type == "cuda" and torch.cuda.get_device_capability(run.device) < (8, 9):
        run.skip("fp8", "this GPU has no FP8")
        return ["bf16"]
    return ["bf16", "fp8"]


def check(run: Run) -> None:
    """Prefill, decode steps (captured on a GPU) and their mixture, teacher-forced, at every position."""
    from export.checkpoint import Checkpoint
    from export.models import deepseek_v2
    from export.quantization import BFloat16, Fp8

    checkpoint = Checkpoint(EXAMPLE)
    texts = _texts(checkpoint.config.vocab_size, DRY_LENGTHS if run.dry else LENGTHS)
    name, expected = reference(run, checkpoint, texts)
    for precision in precisions(run)[: 1 if run.dry else None]:
        scheme, weights = (Fp8() if precision == "fp8" else BFloat16()), deepseek_v2.weights(checkpoint.config)
        stored = {
            w.name + kind.suffix: tensor.contiguous().to(run.device)
            for w in weights
            for kind, tensor in zip(scheme.stored(w), scheme.encode(w, w.read(checkpoint.read)), strict=True)
        }
        model = graph(checkpoint.config, precision, weights)
        for capture in (False, True) if run.device.type == "cuda" else (False,):
            label = f"torch backend {precision}{', decode captured' if capture else ''}"
            if run.late(label):
                continue
            pages = 2 + sum(-(-len(t) // 64) for t in texts)
            steps = runner(run, model, stored, checkpoint.config, pages, capture=capture)
            check_groups(run, label, steps.program, checkpoint.config, precision)
            try:
                found = teacher_forced(steps.step, texts)
                compare(run, f"{label} against {name}", found, expected, LIMITS[precision])
                if capture:
                    run.check(f"{label}: CUDA graphs", float(bool(steps.uncaptured)), 0, steps.uncaptured[:300])
            except Exception as error:  # capturing may fail where running does not
                run.check(f"{label} runs", float("nan"), 0, f"{type(error).__name__}: {error}"[:300])


def groups(config, precision: str, form: str = "absorbed") -> dict[str, int]:
    """How many groups of each kind a step graph has, once fused and merged by runtime/backends: so many as its layers imply."""
    layers = config.num_hidden_layers
    moe = sum(config.is_moe_layer(i) for i in range(layers))
    gated = layers if config.n_shared_experts else layers - moe  # layers with a SwiGLU outside of routed experts
    found = dict(Latent=layers, MoeRoute=moe, MoeExperts=moe, WideLinear=moe, SumNorm=2 * layers - 1, SwiGlu=gated)
    found["Columns"] = layers + gated  # merged products
    found |= dict(MlaAttention=layers, MatMulByHead=2 * layers) if form == "absorbed" else dict(MlaPrefill=layers)
    products = (3 if config.q_lora_rank else 2) * layers + 2 * gated
    return found | (dict(Float8Linear=products) if precision == "fp8" else {})


def check_groups(run: Run, label: str, program, config, precision: str) -> None:
    """Another exporter's graph may be written otherwise: what is not fused is right, but slow, and says nothing."""
    expected = groups(config, precision, "expanded" if program.op_counts["MlaPrefill"] else "absorbed")
    counts = {name: program.op_counts[name] for name in expected}
    missing = sum(abs(counts[name] - n) for name, n in expected.items())
    wrong = {name: n for name, n in expected.items() if counts[name] != n}
    note = ", ".join(f"{name} {n}" for name, n in counts.items()) + (f"; expected {wrong}" if wrong else "")
    run.check(f"{label}: fused groups that are not as its layers imply", missing, 0, note)


def _texts(vocab_size: int, lengths) -> list[list[int]]:
    """Token ids of the held-out text where there is a tokenizer, else random ones."""
    try:
        from tokenizers import Tokenizer

        ids = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json")).encode((EXAMPLE / "held_out.txt").read_text()).ids
    except ImportError:
        ids = np.random.default_rng(0).integers(0, vocab_size, 1000).tolist()
    starts = np.cumsum([0, *lengths])
    return [ids[s : s + n] for s, n in zip(starts, lengths, strict=False)]


def reference(run: Run, checkpoint, texts: list[list[int]]) -> tuple[str, list[np.ndarray]]:
    """Logits by transformers in float32 where it passes its audit, else by the float32 model definition, and which."""
    try:
        import transformers

        from validation.reference import Reference

        model = Reference(checkpoint)
        return f"transformers {transformers.__version__}", [model.logits(np.array(t)) for t in texts]
    except Exception as error:  # missing, or refused by its audit
        run.skip("transformers as the reference", f"{type(error).__name__}: {error}")
    from export.models import deepseek_v2

    model = deepseek_v2.DeepseekV2Step(checkpoint.config).eval().load_weights(checkpoint.read)
    width = checkpoint.config.kv_lora_rank + checkpoint.config.qk_rope_head_dim
    found = []
    for tokens in texts:
        n, pages = len(tokens), -(-len(tokens) // 64)
        inputs = (tokens, range(n), [0, n], [0], [range(1, pages + 1)], [n], range(n))
        caches = [torch.zeros(pages + 1, 64, width) for _ in range(checkpoint.config.num_hidden_layers)]
        with torch.no_grad():
            logits, _, _ = model(*(torch.tensor(np.array(i), dtype=torch.int32) for i in inputs), caches)
        found.append(logits.numpy())
    return "our own model in float32", found


def teacher_forced(step, texts: list[list[int]]) -> list[np.ndarray]:
    """Logits at every position: half of each text as a prompt, then token by token, then the rest in one mixed step."""
    from runtime.backends.base import SequenceRows, StepBatch

    done, found = [0] * len(texts), [[] for _ in texts]
    table = np.zeros((len(texts), max(-(-len(t) // 64) for t in texts)), np.int32)
    page = iter(np.random.default_rng(1).permutation(np.arange(1, 1 + sum(-(-len(t) // 64) for t in texts))))
    for row, tokens in zip(table, texts, strict=True):
        for k in range(-(-len(tokens) // 64)):
            row[k] = next(page)
    halves = [len(t) // 2 for t in texts]
    for counts in (halves, *[[1] * len(texts)] * 2, [len(t) - h - 2 for t, h in zip(texts, halves, strict=True)]):
        rows = [SequenceRows(t[d : d + n], d, range(n)) for t, d, n in zip(texts, done, counts, strict=True)]
        logits, start = step(StepBatch.of(rows, table)), 0
        for i, n in enumerate(counts):
            found[i].append(logits[start : start + n])
            start, done[i] = start + n, done[i] + n
    return [np.concatenate(parts) for parts in found]


def compare(run: Run, name: str, found: list[np.ndarray], expected: list[np.ndarray], limit: float) -> None:
    """Median relative error of a row, and how often the best token is the same (told, not judged)."""
    f, e = np.concatenate(found), np.concatenate(expected)
    errors = np.linalg.norm(f - e, axis=1) / np.linalg.norm(e, axis=1)
    same = float((f.argmax(1) == e.argmax(1)).mean())
    run.check(name, float(np.median(errors)), limit, f"largest {errors.max():.3g}, same best token {same:.3f}")


def measure(run: Run) -> None:
    """Decode at 1 to 128 sequences of 1K tokens, random weights made on the device; transformers in the same section."""
    from export.config import parse

    raw = _raw_config(run)
    config = parse(raw)
    sizes = (2,) if run.dry else (1, 2, 4, 8, 16, 32, 64, 128)
    for precision in precisions(run)[: 1 if run.dry else None]:
        start = time.monotonic()
        model = graph(config, precision)
        if run.device.type == "cuda" and 1.1 * declared_bytes(model) > run.free_bytes():
            run.skip(f"V2-Lite {precision}", "the weights do not fit into this GPU's memory")
            continue
        weights = random_weights(run, model)
        steps = runner(run, model, weights, config, 1 + max(sizes) * (CONTEXT // 64 + 1), sizes=sizes)
        check_groups(run, f"V2-Lite {precision}", steps.program, config, precision)
        for cache in steps.caches.values():
            cache.normal_()
        run.measure(f"V2-Lite {precision} loaded", seconds=time.monotonic() - start, weights_GB=_bytes(weights.values()) / 1e9)
        for size in sizes:
            if not run.late(f"V2-Lite {precision}, batch {size}"):
                _measure_one(run, steps, config, weights, precision, size)
        _measure_prefill(run, steps, precision)
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
    from runtime.backends.torch_ops import DTYPES

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
            tensor.fill_(1.0 / 448 * 0.1)
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
    from runtime.backends.base import SequenceRows, StepBatch
    from runtime.backends.padding import decode_shape

    context = 64 if run.dry else CONTEXT
    table = np.arange(1, 1 + size * (context // 64 + 1)).reshape(size, -1)
    batch = StepBatch.of([SequenceRows([7 + i], context, [0]) for i in range(size)], table)
    logits = steps.step(batch)
    run.check(f"V2-Lite {precision}, batch {size}: logits that are not numbers", float((~np.isfinite(logits)).sum()), 0)
    captured = steps.captured(decode_shape(batch, steps.sizes, steps.max_pages)) if steps.capture else None
    if steps.capture:
        run.check(f"V2-Lite {precision}, batch {size}: CUDA graph", float(not captured), 0, steps.uncaptured[:300])
    step = captured.graph.replay if captured else lambda: steps.step(batch)
    seconds = timed(run, {"step": step}, capture=False)["step"]
    start = time.perf_counter()
    for _ in range(1 if run.dry else 10):
        steps.step(batch)
    wall = (time.perf_counter() - start) / (1 if run.dry else 10)
    read = touched(config, weights, size) + size * context * config.num_hidden_layers * 2 * 576
    run.measure(
        f"V2-Lite {precision}, batch {size}, context {context}", tokens_per_s=size / seconds, step_ms=seconds * 1e3,
        with_logits_tokens_per_s=size / wall, of_bandwidth=read / HBM / seconds,
        of_copy=read / seconds / run.ceilings["copy"], read_GB=read / 1e9,
    )  # fmt: skip


def _measure_prefill(run: Run, steps, precision: str) -> None:
    """One chunk of a prompt, not captured: launches from Python are part of the time."""
    from runtime.backends.base import SequenceRows, StepBatch

    rows = 16 if run.dry else 2048
    batch = StepBatch.of([SequenceRows(range(rows), 0, [rows - 1])], np.arange(1, 2 + rows // 64)[None])
    seconds = []
    for _ in range(1 if run.dry else 5):
        start = time.perf_counter()
        steps.step(batch)
        seconds.append(time.perf_counter() - start)
    run.measure(f"V2-Lite {precision}, chunk of {rows}", tokens_per_s=rows / float(np.median(seconds)))


def touched(config, weights: dict, tokens: int) -> float:
    """Bytes of weights that a step of `tokens` rows reads, if routing is even: all but the embedding and idle experts."""
    share = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** tokens
    routed = _bytes(t for n, t in weights.items() if ".mlp.experts." in n)
    rest = _bytes(t for n, t in weights.items() if ".mlp.experts." not in n and "embed_tokens" not in n)
    return rest + share * routed


def _raw_config(run: Run) -> dict:
    path = EXAMPLE / "config.json" if run.dry else ROOT / "tests" / "configs" / "v2_lite.json"
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
