"""mla_attention: checked against float64 on real shapes, and decode measured against both roofline terms.

Both sections go on with mla_prefill (benchmarks/gpu/prefill.py).
"""

from collections.abc import Callable

import torch

from benchmarks.gpu.run import BF16_FLOPS, Run, relative_error, timed
from latentrt.plugins import cache_formats
from latentrt.plugins.mla_attention.kernel import mla_attention_
from latentrt.plugins.mla_attention.reference import mla_attention

SCALE = 0.1147  # V2's softmax scale with mscale^2
PAGE = 64
LIMIT = {torch.bfloat16: 8e-3, torch.float16: 1e-3}  # |error| / |reference|: weights and result are rounded once each
CASES = {  # new tokens, cached tokens of every sequence
    "mixed": ([7, 1, 0, 33, 1, 200, 64], [5, 0, 3, 130, 4097, 1000, 64]),
    "decode": ([1] * 9, [0, 1, 62, 63, 64, 65, 1000, 4095, 8191]),
    "long": ([1], [50001]),
    "prompt": ([777, 300], [0, 512]),
    "nothing": ([0, 0], [10, 0]),
}
DRY_CASES = {"mixed": ([7, 1, 0, 3], [5, 0, 3, 130]), "decode": ([1, 1], [64, 65])}


def batch(
    run: Run, new: list[int], past: list[int], heads: int, dtype: torch.dtype, rank=512, rope=64, padding=3,
    cache_format: str | None = None,
) -> list:  # fmt: skip
    """Arguments of the op: shuffled pages, NaN in every cache cell that holds no token, padding rows, wild table entries."""
    counts = [-(-(n + p) // PAGE) for n, p in zip(new, past, strict=True)]
    free = iter((torch.randperm(sum(counts), generator=torch.Generator().manual_seed(sum(past))) + 1).tolist())
    table = torch.full((len(new), max(*counts, 1) + 2), 2**30, dtype=torch.int32)
    layout = cache_formats.get(cache_format or str(dtype).removeprefix("torch."))
    nothing = layout.encode(*torch.full((rank + rope,), float("nan"), device=run.device).split([rank, rope]))
    cache = nothing.repeat(sum(counts) + 2, PAGE, 1)
    for b, count in enumerate(counts):
        pages = torch.tensor([next(free) for _ in range(count)], dtype=torch.int32)
        table[b, :count] = pages
        at = torch.arange(past[b])
        tokens = run.randn(past[b], rank + rope, dtype=dtype).split([rank, rope], -1)
        cache[pages.long()[at // PAGE], at % PAGE] = layout.encode(*tokens)
    rows = sum(new) + padding
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
    shapes = (rows, heads, rank), (rows, heads, rope), (rows, rank), (rows, rope)
    lengths, count = torch.tensor(past, dtype=torch.int32), torch.tensor([sum(new)], dtype=torch.int32)
    integers = [t.to(run.device) for t in (table, lengths, starts, count)]
    return [*(run.randn(*s, dtype=dtype) for s in shapes), cache, *integers]


def check(run: Run) -> None:
    """Both head counts, both dtypes, every case, and packed caches; the cache must come out bit for bit."""
    sizes = dict(rank=64, rope=16) if run.dry else {}
    for dtype in (torch.bfloat16,) if run.dry else (torch.bfloat16, torch.float16):
        for heads in (16,) if run.dry else (16, 128):
            for name, (new, past) in (DRY_CASES if run.dry else CASES).items():
                label = f"{name}, {heads} heads, {dtype}"
                if not run.late(label):
                    _check_case(run, label, batch(run, new, past, heads, dtype, **sizes))
    for cache_format in cache_formats.PACKED:
        for heads in (16,) if run.dry else (16, 128):
            for name in ("mixed", "decode"):
                label = f"{name}, {heads} heads, {cache_format} cache"
                if not run.late(label):
                    case = (DRY_CASES if run.dry else CASES)[name]
                    arguments = batch(run, *case, heads, torch.bfloat16, **sizes, cache_format=cache_format)
                    _check_case(run, label, arguments, cache_format)
    _prefill().check(run)


def _prefill():
    from benchmarks.gpu import prefill

    return prefill


def _check_case(run: Run, name: str, arguments: list, cache_format: str | None = None) -> None:
    dtype, count = arguments[0].dtype, int(arguments[8])
    cache_format = cache_format or str(dtype).removeprefix("torch.")
    mine = [a.clone() if i == 4 else a for i, a in enumerate(arguments)]
    attended = mla_attention_(*mine, SCALE, cache_format)
    wide = [a.double() if i < 2 else a for i, a in enumerate(arguments)]
    expected, cache = mla_attention(*wide, SCALE, cache_format)
    same = torch.equal(mine[4].view(torch.int16), cache.view(torch.int16))
    run.check(f"{name}: cache", 0.0 if same else float("nan"), 0)
    run.check(f"{name}: padding rows", attended[count:].float().abs().sum().item(), 0)
    if count:
        run.check(name, relative_error(attended[:count], expected[:count]), LIMIT[dtype])


def measure(run: Run) -> None:
    """Decode: batch x context x heads. Launches in a row read different pages, so that none is found in the L2."""
    from benchmarks.gpu.ahead import Ahead

    _prefill().measure(run)
    heads = (16,) if run.dry else (16, 128)
    contexts = (128,) if run.dry else (1024, 4096, 16384, 65536)
    batches = (2,) if run.dry else (1, 16, 64, 128)
    rank, rope = (64, 16) if run.dry else (512, 64)
    pages = 1 + min(max(batches) * (max(contexts) // PAGE + 2), run.free_bytes() // 2 // (PAGE * 2 * (rank + rope)))
    cache, ahead = run.randn(pages, PAGE, rank + rope), Ahead(run)
    for h in heads:
        for length in contexts:
            for b in batches:
                label = f"decode {h} heads, batch {b}, context {length}"
                if b * (length // PAGE) >= pages:
                    run.skip(label, "the cache does not fit into this GPU's memory")
                elif not run.late(label):
                    _measure_one(run, ahead, label, cache, h, b, length)
    measure_packed(run)


def measure_packed(run: Run) -> None:
    """Decode over packed caches, all of whose cells hold one random token, beside bfloat16: the time of one step."""
    from benchmarks.gpu.ahead import jit

    heads, lengths, batches = ((16,), (128,), (2,)) if run.dry else ((16, 128), (4096, 16384), (1, 64))
    rank, rope = (64, 16) if run.dry else (512, 64)
    for name in ("bfloat16", *cache_formats.PACKED):
        layout = cache_formats.get(name)
        for h in heads:
            for length in lengths:
                for b in batches:
                    label = f"decode {h} heads, batch {b}, context {length}, {name} cache"
                    if run.late(label):
                        continue
                    token = layout.encode(run.randn(rank), run.randn(rope))
                    pages = b * (length // PAGE)
                    cache = token.repeat(1 + pages * run.sets(pages * PAGE * token.nbytes), PAGE, 1)
                    sets = _input_sets(run, cache, h, b, length, rank, rope)

                    def step(sets=sets, name=name) -> None:
                        for arguments in sets:
                            mla_attention_(*arguments, SCALE, name)

                    seconds = timed(run, {"latentrt": step}, len(sets))["latentrt"]
                    read = b * length * layout.bytes_per_token(rank, rope)
                    run.measure(
                        label, us=seconds * 1e6, GBps=read / seconds / 1e9, of_roofline=read / run.bandwidth / seconds,
                        kernels=jit(), sets=len(sets),
                    )  # fmt: skip


def _measure_one(run: Run, ahead, label: str, cache: torch.Tensor, heads: int, sequences: int, length: int) -> None:
    sets = _input_sets(run, cache, heads, sequences, length)
    ours, kernels = _ours(ahead, sets)
    found = timed(run, {"latentrt": ours} | _baselines(run, sets, length), len(sets))
    tokens, width, rank = sequences * length, cache.shape[2], sets[0][0].shape[2]
    read = tokens * 2 * width + sequences * heads * 2 * (rank + width)
    operations = 2 * tokens * heads * (rank + width)
    seconds, memory = found["latentrt"], read / run.bandwidth
    bound = max(memory, operations / BF16_FLOPS)
    others = {f"{name}_us": s * 1e6 for name, s in found.items() if name != "latentrt"}
    run.measure(
        label, us=seconds * 1e6, GBps=read / seconds / 1e9,
        TFLOPS=operations / seconds / 1e12, of_roofline=bound / seconds, of_copy=read / seconds / run.ceilings["copy"],
        bound="memory" if bound == memory else "compute", kernels=kernels, sets=len(sets), **others,
        **{f"{n}_ratio": s / seconds for n, s in found.items() if n != "latentrt"},
    )  # fmt: skip


def _ours(ahead, sets: list[list]) -> tuple[Callable[[], None], str]:
    """Runs all sets, with kernels compiled ahead of time where they are there; and which kernels these are."""
    from benchmarks.gpu.ahead import jit

    def ours() -> None:
        for arguments in sets:
            mla_attention_(*arguments, SCALE, "bfloat16")

    attributes = dict(softmax_scale=SCALE, cache_format="bfloat16")
    return ahead.calls("mla_attention", sets, attributes) or (ours, jit())


def _input_sets(
    run: Run, cache: torch.Tensor, heads: int, sequences: int, length: int, rank: int | None = None, rope: int | None = None
) -> list[list]:
    """Arguments that read disjoint pages, together several times what the L2 holds, as far as the cache has room."""
    width, rank = (length + PAGE - 1) // PAGE, rank or (64 if run.dry else 512)
    per_set = sequences * width
    count = max(1, min(run.sets(per_set * cache[0].nbytes), (cache.shape[0] - 1) // per_set))
    order = torch.randperm(cache.shape[0] - 1, device=run.device).int() + 1
    integers = dict(dtype=torch.int32, device=run.device)
    lengths = torch.full((sequences,), length - 1, **integers)
    starts, number = torch.arange(sequences + 1, **integers), torch.tensor([sequences], **integers)
    rope = rope or cache.shape[2] - rank
    shapes = (sequences, heads, rank), (sequences, heads, rope), (sequences, rank), (sequences, rope)
    sets = []
    for i in range(count):
        table = order[i * per_set : (i + 1) * per_set].view(sequences, width).clone()  # 16-byte aligned
        sets.append([*(run.randn(*s) for s in shapes), cache, table, lengths, starts, number])
    return sets


def _baselines(run: Run, sets: list[list], length: int) -> dict:
    """torch's attention over keys that lie together (no paging, no append), and MLA kernels of others where importable."""
    from benchmarks.gpu import attention_baselines

    return attention_baselines.candidates(run, sets, length, SCALE)
