"""moe_route and moe_experts: checked on real shapes, experts measured."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.gpu.run import BF16_FLOPS, Run, relative_error, timed
from latentrt.plugins.moe_experts.kernel import moe_experts
from latentrt.plugins.moe_experts.reference import moe_experts as moe_experts_reference
from latentrt.plugins.moe_route.kernel import moe_route
from latentrt.plugins.moe_route.reference import moe_route as moe_route_reference

LARGEST = 448.0
NEAR_TIE = 1e-6  # scores nearer than this may come in either order
SHAPES = {  # experts, hidden, inner, top_k, routing
    "V2-Lite": (64, 2048, 1408, 6, dict(topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0)),
    "V2": (160, 5120, 1536, 6, dict(topk_method="group_limited_greedy", n_group=8, topk_group=3, routed_scaling_factor=16.0)),
}  # fmt: skip
_TINY = dict(topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=2.0)
DRY_SHAPES = {"tiny": (8, 64, 32, 3, _TINY)}
KINDS = {"bf16": 2, "FP8": 1, "int4": 0.54}  # of weights: bytes of an element, scales included
LIMITS = {"bf16": 8e-3, "int4": 8e-3, "FP8": 3e-2}  # FP8: a row near a rounding boundary may fall to its other side


def check_route(run: Run) -> None:
    """Ids, weights to rounding; rows of equal logits; padding rows; softmax and sigmoid, both group scores."""
    for name, (experts, _, _, top_k, routing) in (DRY_SHAPES if run.dry else SHAPES).items():
        for scoring, score in (("softmax", "max"), ("sigmoid", "top2_sum")):
            for normalize in (0, 1):
                tokens = 9 if run.dry else 1025
                logits = torch.randn(tokens, experts, device=run.device, generator=run.generator(experts))
                logits[1], logits[2, ::2] = 0.5, 3.0  # ties
                count = torch.tensor([tokens - 2], dtype=torch.int32, device=run.device)
                options = dict(scoring_func=scoring, group_score=score, top_k=top_k, norm_topk_prob=normalize) | routing
                ids, weights = moe_route(logits, count, None, **options)
                expected, scores = moe_route_reference(logits, count, None, **options)
                label = f"route {name} {scoring} {score} normalize {normalize}"
                run.check(f"{label}: ids that differ", _wrong_ids(logits, scoring, ids, expected), 0)
                run.check(label, relative_error(weights, scores), 1e-6)


def _wrong_ids(logits: torch.Tensor, scoring: str, ids: torch.Tensor, expected: torch.Tensor) -> int:
    """Ids [T, top_k] that differ, but not where two scores are nearer than rounding; equal logits have one right answer."""
    wide = logits.double()
    scores = wide.softmax(-1) if scoring == "softmax" else wide.sigmoid()
    gap = (scores.gather(1, ids.clamp_min(0).long()) - scores.gather(1, expected.clamp_min(0).long())).abs()
    exact = (ids < 0) | (expected < 0) | (gap == 0)
    return ((ids != expected) & (exact | (gap > NEAR_TIE))).sum().item()


def _weights(run: Run, shape: tuple[int, ...], kind: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[E, out, in] at a scale that keeps the size of rows; FP8 with a scale per output channel, expert by expert; int4 as
    random bytes [E, out, in / 2] with a scale per 128 inputs."""
    if kind == "bf16":
        return run.randn(*shape, scale=shape[-1] ** -0.5), None
    if kind == "int4":
        packed = torch.empty((*shape[:2], shape[2] // 2), dtype=torch.int8, device=run.device).random_(-128, 128)
        spread = shape[-1] ** -0.5 / 4.6  # the standard deviation of -8 .. 7 is 4.6
        return packed, torch.rand(*shape[:2], -(-shape[2] // 128), device=run.device).add_(0.5).mul_(spread)
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
    if gate_up.dtype == torch.int8:
        parts = (gate_up, down, gate_up_scale, down_scale)
        return moe_experts_reference(x.double(), ids, weights, *parts, **_attributes(gate_up))
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


def _attributes(weight: torch.Tensor) -> dict[str, int | str]:
    return dict(first_expert=0, gate_up_layout="concatenated", packed=2 if weight.dtype == torch.int8 else 1)


def _routing(run: Run, kind: str, tokens: int, experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """"random", "one" expert for all, or "few" experts; the last row is padding where there are several. "full": none is."""
    ids = torch.rand(tokens, experts, device=run.device).argsort(-1)[:, :top_k].int()
    if kind == "few":
        ids = torch.rand(tokens, top_k, device=run.device).argsort(-1).int()
    if kind == "one":
        ids[:, 0], ids[:, 1:] = experts - 1, -1
    if tokens > 1 and kind != "full":
        ids[-1] = -1
    return ids, torch.rand(tokens, top_k, device=run.device)


def _fits(run: Run, label: str, elements: int, kind: str) -> bool:
    """Whether this GPU can multiply and hold three matrices of `elements`; notes what is left out."""
    if kind == "FP8" and run.device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        run.skip(label, "this GPU has no FP8")
    elif run.device.type == "cuda" and 3 * elements * KINDS[kind] * 1.2 > run.free_bytes():
        run.skip(label, "the weights do not fit into this GPU's memory")
    else:
        return True
    return False


def check_experts(run: Run) -> None:
    """bf16, FP8 and int4 weights, 1 to 700 tokens, balanced, few experts, and one expert that takes all."""
    cases = (("random", 1), ("random", 17), ("few", 129), ("one", 300), ("random", 700))
    cases = (("random", 5), ("one", 4)) if run.dry else cases
    for name, (experts, hidden, inner, top_k, _) in (DRY_SHAPES if run.dry else SHAPES).items():
        for storage in KINDS:
            if not _fits(run, f"experts {name} {storage}", experts * hidden * inner, storage):
                continue
            gate_up, gate_up_scale = _weights(run, (experts, 2 * inner, hidden), storage)
            down, down_scale = _weights(run, (experts, hidden, inner), storage)
            for kind, tokens in cases:
                label = f"experts {name} {storage} {kind} {tokens}"
                if run.late(label):
                    continue
                x = run.randn(tokens, hidden)
                ids, weights = _routing(run, kind, tokens, experts, top_k)
                parts = (gate_up, down, gate_up_scale, down_scale)
                y = moe_experts(x, ids, weights, *parts, **_attributes(gate_up))
                expected = _reference(x, ids, weights, *parts)
                run.check(label, relative_error(y, expected), LIMITS[storage])
            del gate_up, down


def measure(run: Run) -> None:
    """1 to 4096 tokens, both models, all kinds of weights; bytes are those of the experts that the tokens chose."""
    from benchmarks.gpu.ahead import Ahead

    counts, ahead = (4,) if run.dry else (1, 4, 16, 64, 256, 1024, 4096), Ahead(run)
    for name, (experts, hidden, inner, top_k, _) in (DRY_SHAPES if run.dry else SHAPES).items():
        for storage in KINDS:
            labels = {n: f"experts {name} {storage}, {n} tokens" for n in counts}
            if not _fits(run, labels[counts[0]], experts * hidden * inner, storage):
                continue
            gate_up, gate_up_scale = _weights(run, (experts, 2 * inner, hidden), storage)
            down, down_scale = _weights(run, (experts, hidden, inner), storage)
            parts = (gate_up, down, gate_up_scale, down_scale)
            for tokens, label in labels.items():
                if not run.late(label):
                    sets = _input_sets(run, tokens, hidden, experts, top_k, gate_up[0].nbytes + down[0].nbytes)
                    _measure_one(run, ahead, label, sets, parts)
            del gate_up, down, parts


def _input_sets(run: Run, tokens: int, hidden: int, experts: int, top_k: int, expert_bytes: int) -> list[tuple]:
    """x, ids and weights of one routing, every set with other experts, so that their weights come from memory."""
    ids, weights = _routing(run, "full", tokens, experts, top_k)
    chosen, order = ids.unique().long(), torch.randperm(experts, device=run.device).int()
    sets, rename = [], torch.zeros(experts, dtype=torch.int32, device=run.device)
    for i in range(run.sets(len(chosen) * expert_bytes)):
        rename[chosen] = order.roll(-i * len(chosen))[: len(chosen)]
        sets.append((run.randn(tokens, hidden), rename[ids.long()], weights))
    return sets


def _measure_one(run: Run, ahead, label: str, sets: list[tuple], parts: tuple) -> None:
    gate_up, down, scale, _ = parts
    ours, kernels = _ours(ahead, sets, parts)
    candidates = {"latentrt": ours}
    if scale is None:
        try:
            candidates["grouped_mm"] = _grouped(sets, gate_up, down)
            candidates["grouped_mm"]()
        except Exception as error:
            candidates.pop("grouped_mm", None)
            run.skip(f"torch grouped_mm, {label}", f"{type(error).__name__}: {error}")
    found = timed(run, candidates, len(sets))
    x, ids, _ = sets[0]
    pairs, chosen = ids.numel(), len(ids.unique())
    read = chosen * sum(part[0].nbytes for part in parts if part is not None) + 2 * x.nbytes
    operations = 2 * pairs * (gate_up[0].numel() + down[0].numel()) * _attributes(gate_up)["packed"]
    seconds, peak = found["latentrt"], BF16_FLOPS * (2 if gate_up.dtype == torch.float8_e4m3fn else 1)
    others = {f"{n}_us": s * 1e6 for n, s in found.items() if n != "latentrt"}
    run.measure(
        label, us=seconds * 1e6, GBps=read / seconds / 1e9, TFLOPS=operations / seconds / 1e12, experts=chosen,
        of_roofline=max(read / run.bandwidth, operations / peak) / seconds, of_copy=read / seconds / run.ceilings["copy"],
        kernels=kernels, sets=len(sets), **others,
        **{f"{n}_ratio": s / seconds for n, s in found.items() if n != "latentrt"},
    )  # fmt: skip


def _ours(ahead, sets: list[tuple], parts: tuple) -> tuple[Callable[[], None], str]:
    """Runs all sets, with kernels compiled ahead of time where they are there; and which kernels these are."""
    from benchmarks.gpu.ahead import jit

    def ours() -> None:
        for arguments in sets:
            moe_experts(*arguments, *parts, **attributes)

    attributes = _attributes(parts[0])
    return ahead.calls("moe_experts", [[*s, *parts] for s in sets], attributes) or (ours, jit())


def _grouped(sets: list[tuple], gate_up: torch.Tensor, down: torch.Tensor) -> Callable[[], None]:
    """torch's grouped products over rows sorted by expert, sorting left out of the time."""
    operands = []
    for x, ids, _ in sets:
        flat = ids.flatten()
        rows = x[flat.argsort(stable=True) // ids.shape[1]]
        operands.append((rows, torch.bincount(flat.long(), minlength=gate_up.shape[0]).cumsum(0).int()))

    def call() -> None:
        for rows, ends in operands:
            gate, up = torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
            torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)

    return call
