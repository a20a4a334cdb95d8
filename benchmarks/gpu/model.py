"""The torch backend: the example model against transformers in float32, in both forms of attention."""

import itertools
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu.run import Run
from latentrt.plugins.step_graph import ABSORBED, EXPANDED, FORMS, cache_name

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "tiny-deepseek-v2"
# median relative error of a row of logits, five layers
LIMITS = {"bf16": 0.05, "fp8": 0.15, "bf16-int4": 0.1, "fp8-int4": 0.15}
TOLD = 12  # last rows of a prompt that get logits where it comes again: with more it would not be captured
LENGTHS, DRY_LENGTHS = (97, 5, 64, 130), (9, 6)


def graphs(config, precision: str) -> dict:
    """The step graphs as the TensorRT lowering writes them (weights as inputs): ONNX models by form."""
    import onnx_ir as ir

    from latentrt.export import graph as step_graph
    from latentrt.export.lowering.tensorrt.lowering import prepare, weight_format
    from latentrt.export.models.deepseek_v2.weights import weights

    members = weights(config)
    models = step_graph.build_forms(config, torch.bfloat16, "bfloat16")
    for model in models.values():
        prepare(model, members, weight_format(members, precision))
    return {form: ir.to_proto(model) for form, model in models.items()}


def runner(run: Run, models: dict, weights: dict, config, num_pages: int, **options):
    """A StepRunner of both forms with a latent cache full of NaN."""
    from latentrt.runtime.backends.torch.graph import StepProgram
    from latentrt.runtime.backends.torch.step import StepRunner

    folded: dict = {}
    programs = {form: StepProgram(m, weights, run.device, "triton", folded=folded) for form, m in models.items()}
    shape = (num_pages, 64, config.kv_lora_rank + config.qk_rope_head_dim)
    caches = {
        cache_name(i): torch.full(shape, float("nan"), dtype=torch.bfloat16, device=run.device)
        for i in range(config.num_hidden_layers)
    }
    return StepRunner(programs, caches, chooser(config), **options)


def chooser(config, *forms: str):
    """What decides on the form of eager steps, among `forms` or all."""
    from latentrt.runtime.backends.forms import FormChooser, Head

    sizes = config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    return FormChooser(forms or FORMS, Head(*sizes, page_size=64))


def precisions(run: Run) -> list[str]:
    """bf16 and fp8, and int4 experts with the better of both that the GPU has."""
    if run.device.type == "cuda" and torch.cuda.get_device_capability(run.device) < (8, 9):
        run.skip("fp8", "this GPU has no FP8")
        return ["bf16", "bf16-int4"]
    return ["bf16", "fp8", "fp8-int4"]


def check(run: Run) -> None:
    """Prefill, decode steps (captured on a GPU) and their mixture, teacher-forced, at every position, in both forms; and
    prompts that come again, which are captured too."""
    from latentrt.export.checkpoint import Checkpoint
    from latentrt.export.lowering.tensorrt.lowering import weight_format
    from latentrt.export.models.deepseek_v2.weights import weights

    checkpoint = Checkpoint(EXAMPLE)
    texts = _texts(checkpoint.config.vocab_size, DRY_LENGTHS if run.dry else LENGTHS)
    name, expected = reference(run, checkpoint, texts)
    # a form at a time: what ends in a fault leaves the other's numbers
    made = {p: graphs(checkpoint.config, p) for p in precisions(run)[: 1 if run.dry else None]}
    for form, precision in itertools.product(FORMS, made):
        scheme = weight_format(weights(checkpoint.config), precision)
        stored = {
            w.name + kind.suffix: tensor.contiguous().to(run.device)
            for w in weights(checkpoint.config)
            for kind, tensor in zip(scheme.stored(w), scheme.encode(w, w.read(checkpoint.read)), strict=True)
        }
        pages = 2 + sum(-(-len(t) // 64) for t in texts)
        for capture in (False, True) if run.device.type == "cuda" else (False,):
            label = f"torch backend {precision}{', captured' if capture else ''}, {form}"
            if run.late(label):
                continue
            steps = runner(run, made[precision], stored, checkpoint.config, pages, capture=capture)
            _check_form(run, label, steps, form, checkpoint.config, precision, texts, name, expected)
            if capture:
                why = steps.uncaptured or steps.uncaptured_prompts
                run.check(f"{label}: CUDA graphs", float(bool(why)), 0, why[:300])


def _check_form(run: Run, label: str, steps, form: str, config, precision: str, texts, name: str, expected) -> None:
    steps.chooser = chooser(config, form)
    check_groups(run, label, steps.programs[form], config, precision)
    try:
        compare(run, f"{label}, against {name}", teacher_forced(steps.step, texts), expected, LIMITS[precision])
        found, ends = repeated(steps, texts), [e[-TOLD:] for e in expected]
        compare(run, f"{label}, prompts that come again, against {name}", found, ends, LIMITS[precision])
    except Exception as error:  # capturing may fail where running does not
        run.check(f"{label} runs", float("nan"), 0, f"{type(error).__name__}: {error}"[:300])


def groups(config, precision: str, form: str = ABSORBED) -> dict[str, int]:
    """How many groups of each kind a step graph has, once fused and merged by runtime/backends: so many as its layers imply."""
    layers = config.num_hidden_layers
    moe = sum(config.is_moe_layer(i) for i in range(layers))
    gated = layers if config.n_shared_experts else layers - moe  # layers with a SwiGLU outside of routed experts
    found = dict(Latent=layers, MoeRoute=moe, MoeExperts=moe, WideLinear=moe, SumNorm=2 * layers - 1, SwiGlu=gated)
    found["Columns"] = layers + gated  # merged products
    found |= dict(MlaAttention=layers, MatMulByHead=2 * layers) if form == ABSORBED else dict(MlaPrefill=layers)
    products = (3 if config.q_lora_rank else 2) * layers + 2 * gated
    return found | (dict(Float8Linear=products) if precision.startswith("fp8") else {})


def check_groups(run: Run, label: str, program, config, precision: str) -> None:
    """Another exporter's graph may be written otherwise: what is not fused is right, but slow, and says nothing."""
    expected = groups(config, precision, EXPANDED if program.op_counts["MlaPrefill"] else ABSORBED)
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

        from latentrt.validation.reference.model import Reference

        model = Reference(checkpoint)
        return f"transformers {transformers.__version__}", [model.logits(np.array(t)) for t in texts]
    except Exception as error:  # missing, or refused by its audit
        run.skip("transformers as the reference", f"{type(error).__name__}: {error}")
    from latentrt.export.models.deepseek_v2 import model as deepseek_v2
    from latentrt.runtime.backends.base import SequenceRows, pack

    model = deepseek_v2.DeepseekV2Step(checkpoint.config).eval().load_weights(checkpoint.read)
    width = checkpoint.config.kv_lora_rank + checkpoint.config.qk_rope_head_dim
    found = []
    for tokens in texts:
        n, pages = len(tokens), -(-len(tokens) // 64)
        batch = pack([SequenceRows(tokens, 0, range(n))], np.arange(1, pages + 1)[None])
        caches = [torch.zeros(pages + 1, 64, width) for _ in range(checkpoint.config.num_hidden_layers)]
        with torch.no_grad():
            logits, _, _ = model({name: torch.from_numpy(value) for name, value in vars(batch).items()}, caches)
        found.append(logits.numpy())
    return "our own model in float32", found


def teacher_forced(step, texts: list[list[int]]) -> list[np.ndarray]:
    """Logits at every position: half of each text as a prompt, then token by token, then the rest in one mixed step."""
    from latentrt.runtime.backends.base import SequenceRows, pack

    done, found, table = [0] * len(texts), [[] for _ in texts], _pages(texts)
    halves = [len(t) // 2 for t in texts]
    for counts in (halves, *[[1] * len(texts)] * 2, [len(t) - h - 2 for t, h in zip(texts, halves, strict=True)]):
        rows = [SequenceRows(t[d : d + n], d, range(n)) for t, d, n in zip(texts, done, counts, strict=True)]
        logits, start = step(pack(rows, table)).logits(), 0
        for i, n in enumerate(counts):
            found[i].append(logits[start : start + n])
            start, done[i] = start + n, done[i] + n
    return [np.concatenate(parts) for parts in found]


def repeated(steps, texts: list[list[int]]) -> list[np.ndarray]:
    """Logits of the last rows of all texts as prompts of one step, run until it is captured and replayed."""
    from latentrt.runtime.backends.base import SequenceRows, pack

    rows = [SequenceRows(t, 0, range(max(0, len(t) - TOLD), len(t))) for t in texts]
    batch = pack(rows, _pages(texts))
    logits = [steps.step(batch).logits() for _ in range(3 if steps.capture else 1)][-1]
    if steps.capture and steps.captured(batch) is None:
        raise RuntimeError(f"prompts that come again are not captured: {steps.uncaptured_prompts}")
    return np.split(logits, np.cumsum([len(r.logits) for r in rows])[:-1])


def _pages(texts: list[list[int]]) -> np.ndarray:
    """A block table with shuffled pages for all texts."""
    table = np.zeros((len(texts), max(-(-len(t) // 64) for t in texts)), np.int32)
    page = iter(np.random.default_rng(1).permutation(np.arange(1, 1 + sum(-(-len(t) // 64) for t in texts))))
    for row, tokens in zip(table, texts, strict=True):
        for k in range(-(-len(tokens) // 64)):
            row[k] = next(page)
    return table


def compare(run: Run, name: str, found: list[np.ndarray], expected: list[np.ndarray], limit: float) -> None:
    """Median relative error of a row, and how often the best token is the same (told, not judged)."""
    f, e = np.concatenate(found), np.concatenate(expected)
    errors = np.linalg.norm(f - e, axis=1) / np.linalg.norm(e, axis=1)
    same = float((f.argmax(1) == e.argmax(1)).mean())
    run.check(name, float(np.median(errors)), limit, f"largest {errors.max():.3g}, same best token {same:.3f}")
