"""moe_route, moe_experts and the torch backend's small kernels: checked on real shapes, experts measured."""

import torch
import torch.nn.functional as F

from benchmarks.gpu.run import BF16_FLOPS, HBM, Run, relative_error, timed
from plugins.moe_experts.kernel import moe_experts
from plugins.moe_route.kernel import moe_route
from plugins.moe_route.reference import moe_route as moe_route_reference

LARGEST = 448.0
SHAPES = {  # experts, hidden, inner, top_k, routing
    "V2-Lite": (64, 2048, 1408, 6, dict(topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0)),
    "V2": (160, 5120, 1536, 6, dict(topk_method="group_limited_greedy", n_group=8, topk_group=3, routed_scaling_factor=16.0)),
}  # fmt: skip
_TINY = dict(topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=2.0)
DRY_SHAPES = {"tiny": (8, 64, 32, 3, _TINY)}


def check_route(run: Run) -> None:
    """Ids exactly, weights to rounding; rows of equal logits; padding rows; softmax and sigmoid, both group scores."""
    for name, (experts, _, _, top_k, routing) in (DRY_SHAPES if run.dry else SHAPES).items():
        for scoring, score in (("softmax", "max"), ("sigmoid", "top2_sum")):
            for normalize in (0, 1):
                tokens = 9 if run.dry else 1025
                logits = torch.randn(tokens, experts, device=run.device)
                logits[1], logits[2, ::2] = 0.5, 3.0  # ties
                count = torch.tensor([tokens - 2], dtype=torch.int32, device=run.device)
                options = dict(scoring_func=scoring, group_score=score, top_k=top_k, norm_topk_prob=normalize) | routing
                ids, weights = moe_route(logits, count, None, **options)
                expected, scores = moe_route_reference(logits, count, None, **options)
                label = f"route {name} {scoring} {score} normalize {normalize}"
                run.check(f"{label}: ids that differ", (ids != expected).sum().item(), 0)
                run.check(label, relative_error(weights, scores), 1e-6)


def _weights(run: Run, shape: tuple[int, ...], float8: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[E, out, in] at a scale that keeps the size of rows; FP8 with a scale per output channel, expert by expert."""
    if not float8:
        return run.randn(*shape, scale=shape[-1] ** -0.5), None
    q = torch.empty(shape, dtype=torch.float8_e4m3fn, device=run.device)
    scale = torch.empty(shape[:2], dtype=torch.float32, device=run.device)
    for e in range(shape[0]):
        w = run.randn(*shape[1:], dtype=torch.float32, scale=shape[-1] ** -0.5)
        scale[e] = w.abs().amax(-1) / LARGEST
        q[e] = (w / scale[e][:, None]).to(torch.float8_e4m3fn)
    return q, scale


def _rounded_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows as e4m3 with a scale each, back in float64."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-10) / LARGEST
    return (x.float() / scale).to(torch.float8_e4m3fn).double() * scale.double()


def _reference(x, ids, weights, gate_up, down, gate_up_scale, down_scale) -> torch.Tensor:
    """y [T, hidden] float64; where weights are FP8, rows are rounded as the kernels round them."""
    y = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    float8 = gate_up_scale is not None
    source = _rounded_rows(x) if float8 else x.double()
    for e in ids.unique().tolist():
        if e < 0:
            continue
        rows, choice = torch.where(ids == e)
        w, d = gate_up[e].double(), down[e].double()
        if float8:
            w, d = w * gate_up_scale[e][:, None], d * down_scale[e][:, None]
        gate, up = F.linear(source[rows], w).chunk(2, -1)
        inner = F.silu(gate) * up
        inner = _rounded_rows(inner.to(x.dtype)) if float8 else inner
        y.index_add_(0, rows, F.linear(inner, d) * weights[rows, choice, None].double())
    return y


def _routing(run: Run, kind: str, tokens: int, experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """"random", "one" expert for all, or "few" experts; the last row is padding where there are several."""
    ids = torch.rand(tokens, experts, device=run.device).argsort(-1)[:, :top_k].int()
    if kind == "few":
        ids = torch.rand(tokens, top_k, device=run.device).argsort(-1).int()
    if kind == "one":
        ids[:, 0], ids[:, 1:] = experts - 1, -1
    if tokens > 1:
        ids[-1] = -1
    return ids, torch.rand(tokens, top_k, device=run.device)


def check_experts(run: Run) -> None:
    """bf16 and FP8 weights, 1 to 700 tokens, balanced, few experts, and one expert that takes all."""
    cases = (("random", 1), ("random", 17), ("few", 129), ("one", 300), ("random", 700))
    cases = (("random", 5), ("one", 4)) if run.dry else cases
    for name, (experts, hidden, inner, top_k, _) in (DRY_SHAPES if run.dry else SHAPES).items():
        for float8 in (False, True):
            if float8 and run.device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
                run.skip(f"experts {name} FP8", "this GPU has no FP8")
                continue
            gate_up, gate_up_scale = _weights(run, (experts, 2 * inner, hidden), float8)
            down, down_scale = _weights(run, (experts, hidden, inner), float8)
            for kind, tokens in cases:
                x = run.randn(tokens, hidden)
                ids, weights = _routing(run, kind, tokens, experts, top_k)
                parts = (gate_up, down, gate_up_scale, down_scale)
                y = moe_experts(x, ids, weights, *parts, 0, "concatenated")
                limit = 3e-2 if float8 else 8e-3  # FP8: a row near a rounding boundary may fall to its other side
                expected = _reference(x, ids, weights, *parts)
                run.check(f"experts {name} {'FP8' if float8 else 'bf16'} {kind} {tokens}", relative_error(y, expected), limit)
            del gate_up, down


def check_fused(run: Run) -> None:
    """The torch backend's rope, SwiGLU, sum and norm, and row quantization, on slices of wider rows."""
    from runtime.backends import torch_kernels as kernels

    tokens, heads, hidden = (3, 2, 96) if run.dry else (77, 128, 5120)
    wide = run.randn(tokens, heads, 192 if not run.dry else 48)
    rope = wide[..., -64:] if not run.dry else wide[..., -16:]
    angle = torch.rand(tokens, 1, rope.shape[-1] // 2, device=run.device)
    even, odd = rope.double().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    expected = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    run.check("fused rope", relative_error(kernels.rotate(rope, cos, sin), expected), 4e-3)
    rows = run.randn(tokens, 3 * hidden)
    a, b, c = rows.split(hidden, 1)
    weight = run.randn(hidden)
    run.check("fused swiglu", relative_error(kernels.swiglu(a, b), F.silu(a.double()) * b.double()), 4e-3)
    for terms in ((a,), (a, b), (a, b, c)):
        total, normed = kernels.sum_norm(weight, terms, 1e-6)
        run.check(f"fused sum of {len(terms)}", relative_error(total, sum(t.double() for t in terms)), 4e-3)
        expected = total.double() * (total.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
        run.check(f"fused norm of {len(terms)}", relative_error(normed, expected), 4e-3)
    q, scale = kernels.quantize_rows(b, 1e-10)
    float8_product(run, tokens, hidden, q, scale, b)
    run.check("fused quantize", relative_error(q.double() * scale, _rounded_rows(b)), 1e-3)


def float8_product(run: Run, tokens: int, hidden: int, q: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> None:
    """The product that FP8 linears run, against float64 on the same e4m3 values; one row too, as decode has it."""
    from runtime.backends.torch_fused_ops import float8_linear

    weight, channel = (t[0] for t in _weights(run, (1, 2 * hidden, hidden), True))
    for rows in (1, tokens):
        y = float8_linear(q[:rows], scale[:rows], weight, channel)
        expected = (q[:rows].double() * scale[:rows]) @ (weight.double() * channel[:, None]).t()
        run.check(f"FP8 linear, {rows} rows", relative_error(y, expected), 4e-3)


def measure(run: Run) -> None:
    """1 to 4096 tokens, both models, bf16 and FP8; bytes are those of the experts that the tokens chose."""
    counts = (4,) if run.dry else (1, 4, 16, 64, 256, 1024, 4096)
    for name, (experts, hidden, inner, top_k, _) in (DRY_SHAPES if run.dry else SHAPES).items():
        for float8 in (False, True):
            gate_up, gate_up_scale = _weights(run, (experts, 2 * inner, hidden), float8)
            down, down_scale = _weights(run, (experts, hidden, inner), float8)
            for tokens in counts:
                label = f"experts {name} {'FP8' if float8 else 'bf16'}, {tokens} tokens"
                if not run.late(label):
                    x, (ids, weights) = run.randn(tokens, hidden), _routing(run, "random", tokens, experts, top_k)
                    _measure_one(run, label, x, ids, weights, (gate_up, down, gate_up_scale, down_scale))
            del gate_up, down


def _measure_one(run: Run, label: str, x, ids, weights, parts: tuple) -> None:
    gate_up, down, scale, _ = parts
    candidates = {"latentrt": lambda: moe_experts(x, ids, weights, *parts, 0, "concatenated")}
    if scale is None:
        try:
            candidates["grouped_mm"] = _grouped(x, ids, gate_up, down)
            candidates["grouped_mm"]()
        except Exception as error:
            candidates.pop("grouped_mm", None)
            run.skip(f"torch grouped_mm, {label}", f"{type(error).__name__}: {error}")
    found = timed(run, candidates)
    pairs, chosen = int((ids >= 0).sum()), int((ids.unique() >= 0).sum())
    read = chosen * (gate_up[0].nbytes + down[0].nbytes) + 2 * x.nbytes
    operations = 2 * pairs * (gate_up[0].numel() + down[0].numel())
    seconds, peak = found["latentrt"], BF16_FLOPS * (1 if scale is None else 2)
    others = {f"{n}_us": s * 1e6 for n, s in found.items() if n != "latentrt"}
    run.measure(
        label, us=seconds * 1e6, GBps=read / seconds / 1e9, TFLOPS=operations / seconds / 1e12, experts=chosen,
        of_roofline=max(read / HBM, operations / peak) / seconds, of_copy=read / seconds / run.ceilings["copy"], **others,
        **{f"{n}_ratio": s / seconds for n, s in found.items() if n != "latentrt"},
    )  # fmt: skip


def _grouped(x, ids, gate_up, down):
    """torch's grouped products over rows sorted by expert, sorting left out of the time."""
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    order = order[flat[order] >= 0]
    rows = x[order // ids.shape[1]]
    ends = torch.bincount(flat[flat >= 0].long(), minlength=gate_up.shape[0]).cumsum(0).int()

    def call():
        gate, up = torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
        return torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)

    return call
