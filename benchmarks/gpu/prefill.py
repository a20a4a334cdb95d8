"""mla_prefill: checked against float64 on real shapes, and measured against mla_attention on the same prompt chunks."""

import torch

from benchmarks.gpu.attention import CASES, DRY_CASES, LIMIT, PAGE, SCALE, batch
from benchmarks.gpu.run import Run, relative_error, timed
from latentrt.plugins.mla_attention.kernel import mla_attention_
from latentrt.plugins.mla_prefill.kernel import mla_prefill_
from latentrt.plugins.mla_prefill.reference import mla_prefill

RANK, NOPE, ROPE, VALUE = 512, 128, 64, 128  # of V2 and V2-Lite
DRY_WIDTHS = 64, 32, 16, 32
CACHE = 6  # position of the cache among the op's inputs
NAMES = ("mixed", "prompt", "nothing")
EMPTY_ROOM = 65536  # tokens of a block table that is nearly unused


def widths(run: Run) -> tuple[int, int, int, int]:
    """kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim."""
    return DRY_WIDTHS if run.dry else (RANK, NOPE, ROPE, VALUE)


def inputs(run: Run, new: list[int], past: list[int], heads: int, dtype: torch.dtype) -> list:
    """Arguments of the op: mla_attention's `batch`, with queries of the heads' own width and the two expansions."""
    rank, nope, rope, value = widths(run)
    _, *tensors = batch(run, new, past, heads, dtype, rank, rope)
    q_nope = run.randn(tensors[0].shape[0], heads, nope, dtype=dtype)
    w_uk, w_uv = (run.randn(heads, *shape, dtype=dtype, scale=rank**-0.5) for shape in ((nope, rank), (rank, value)))
    return [q_nope, *tensors[:3], w_uk, w_uv, *tensors[3:]]


def check(run: Run) -> None:
    """Both head counts, both dtypes, every case, in one segment (16 heads) and in several; the cache bit for bit."""
    cases = {"mixed": DRY_CASES["mixed"]} if run.dry else {name: CASES[name] for name in NAMES}
    for heads in (2,) if run.dry else (16, 128):
        for dtype in (torch.bfloat16,) if run.dry else (torch.bfloat16, torch.float16):
            for name, (new, past) in cases.items():
                for segment in (None, 128 if run.dry else 1024):
                    label = f"expanded {name}, {heads} heads, {dtype}" + (f", segments of {segment}" if segment else "")
                    if not run.late(label):
                        _check_case(run, label, inputs(run, new, past, heads, dtype), segment)


def _check_case(run: Run, name: str, arguments: list, segment: int | None) -> None:
    dtype, count = arguments[0].dtype, int(arguments[-1])
    cache_format = str(dtype).removeprefix("torch.")
    mine = [a.clone() if i == CACHE else a for i, a in enumerate(arguments)]
    attended = mla_prefill_(*mine, SCALE, cache_format, segment=segment)
    wide = [a.double() if i < 2 else a for i, a in enumerate(arguments)]
    expected, cache = mla_prefill(*wide, SCALE, cache_format)
    same = torch.equal(mine[CACHE].view(torch.int16), cache.view(torch.int16))
    run.check(f"{name}: cache", 0.0 if same else float("nan"), 0)
    run.check(f"{name}: padding rows", attended[count:].float().abs().sum().item(), 0)
    if count:
        run.check(name, relative_error(attended[:count], expected[:count]), LIMIT[dtype])


def measure(run: Run) -> None:
    """Prompt chunks of one sequence: rows x prefix x heads; and one whose block table has room for far more than it holds."""
    chunks, prefixes = ((64,), (64,)) if run.dry else ((512, 2048), (0, 4096, 16384))
    for heads in (2,) if run.dry else (16, 128):
        for rows in chunks:
            for prefix in prefixes:
                _measure_one(run, heads, rows, prefix, 0)
        _measure_one(run, heads, chunks[-1], prefixes[0], 512 if run.dry else EMPTY_ROOM)


def _measure_one(run: Run, heads: int, rows: int, prefix: int, room: int) -> None:
    """Expanded against absorbed: projections to and from the latent belong to the absorbed form, as in the step graph.

    Both through Triton's JIT, since the absorbed form is more than one op.
    """
    from benchmarks.gpu.ahead import jit

    label = f"prefill {heads} heads, chunk {rows}, prefix {prefix}" + (f", room {room}" if room else "")
    if run.late(label):
        return
    rank, nope, rope, value = widths(run)
    sets = [_chunk(run, heads, rows, prefix, room)]
    sets += [_chunk(run, heads, rows, prefix, room) for _ in range(run.sets(sum(t.nbytes for t in sets[0])) - 1)]

    def expanded() -> None:
        for arguments in sets:
            mla_prefill_(*arguments, SCALE, "bfloat16")

    def absorbed() -> None:
        for q_nope, q_pe, latent, k_pe, w_uk, w_uv, *pages in sets:
            q_latent = torch.einsum("thn,hnr->thr", q_nope, w_uk)
            attended = mla_attention_(q_latent, q_pe, latent, k_pe, *pages, SCALE, "bfloat16")
            torch.einsum("thr,hrv->thv", attended, w_uv)

    found = timed(run, {"expanded": expanded, "absorbed": absorbed}, len(sets))
    pairs = rows * prefix + rows * (rows + 1) // 2
    expansion, projection = (2 * n * heads * rank * (nope + value) for n in (prefix + rows, rows))
    operations = {
        "expanded": 2 * pairs * heads * (nope + rope + value) + expansion,
        "absorbed": 2 * pairs * heads * (2 * rank + rope) + projection,
    }
    values = {f"{n}_us": s * 1e6 for n, s in found.items()}
    values |= {f"{n}_TFLOPS": operations[n] / s / 1e12 for n, s in found.items()}
    values["absorbed_over_expanded"] = found["absorbed"] / found["expanded"]
    values["of_matmul"] = operations["expanded"] / found["expanded"] / run.ceilings["matmul"]
    run.measure(label, kernels=jit(), sets=len(sets), **values)


def _chunk(run: Run, heads: int, rows: int, prefix: int, room: int) -> list:
    """Arguments of the op for one sequence, every row real."""
    rank, nope, rope, value = widths(run)
    used = -(-(prefix + rows) // PAGE)
    integers = dict(dtype=torch.int32, device=run.device)
    table = torch.zeros(1, max(used, room // PAGE), **integers)
    table[0, :used] = torch.randperm(used, device=run.device).int() + 1
    shapes = (rows, heads, nope), (rows, heads, rope), (rows, rank), (rows, rope), (heads, nope, rank), (heads, rank, value)
    scales = 1, 1, 1, 1, rank**-0.5, rank**-0.5
    tensors = [run.randn(*shape, scale=scale) for shape, scale in zip(shapes, scales, strict=True)]
    lengths = [torch.tensor(x, **integers) for x in ([prefix], [0, rows], [rows])]
    return [*tensors, run.randn(used + 1, PAGE, rank + rope), table, *lengths]
