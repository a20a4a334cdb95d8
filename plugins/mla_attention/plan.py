"""Launch plans of `mla_attention`: append, attend (directly, or split over the cached tokens), combine."""

from dataclasses import dataclass
from functools import lru_cache, partial
from math import e, log2

from latentrt.plugins import cache_formats
from latentrt.plugins.architecture import Gpu
from latentrt.plugins.launch.plan import ELEMENTS, KernelSpec, Launch, Plan, bind, cdiv, place, power_of_two, require
from latentrt.plugins.mla_attention.tiles import FEW, TILES, Tile

DTYPES = ("bfloat16", "float16")
CACHE_ELEMENTS = ("bf16", "fp16", "i32")
SEARCH_BLOCK = 128  # sequences looked at together when a program finds its own
MAX_WIDTH = 576  # elements of a cached token that the tiles leave shared memory for
COMBINE = {16: 128, 64: 64, 256: 32}  # most splits that a kernel adds up at once, and elements of the rank it does so for
MAX_SPLITS = max(COMBINE)
MAX_PROGRAMS = 4  # splitting makes no more programs than this per multiprocessor
SPLIT_COST = 4  # blocks of cached tokens that take as long as a program's beginning and end
PARTIALS = 100  # partial tiles that are written and read again in the time of one block
_require = partial(require, "mla_attention")


def cache_elements(cache_format: str) -> str:
    """The type of a cache's elements in Triton's words."""
    return ELEMENTS[cache_formats.get(cache_format).element]


def check_format(op: str, cache_format: str, kv_lora_rank: int, qk_rope_head_dim: int) -> None:
    """PlanError unless kernels take caches of this format and these sizes."""
    accepted = [name for name in cache_formats.NAMES if cache_elements(name) in CACHE_ELEMENTS]
    require(op, cache_format in accepted, "cache_format", cache_format, ", ".join(accepted))
    sizes = (kv_lora_rank, qk_rope_head_dim)
    refusal = cache_formats.get(cache_format).refusal(*sizes)
    require(op, refusal is None, f"kv_lora_rank, qk_rope_head_dim with cache_format {cache_format}", sizes, refusal)


@dataclass(frozen=True)
class Attention:
    """The static part of an op call. dtype is that of the queries and the output; softmax_scale includes mscale^2."""

    heads: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    page_size: int
    dtype: str
    cache_format: str
    softmax_scale: float

    def __post_init__(self) -> None:
        _require(self.dtype in DTYPES, "dtype", self.dtype, DTYPES)
        rank, rope, page = self.kv_lora_rank, self.qk_rope_head_dim, self.page_size
        check_format("mla_attention", self.cache_format, rank, rope)
        _require(rank >= 16 and rank == power_of_two(rank), "kv_lora_rank", rank, "powers of two from 16")
        _require(rope > 0 and rope % 16 == 0, "qk_rope_head_dim", rope, "multiples of 16")
        width = rank + power_of_two(rope)
        _require(width <= MAX_WIDTH, "kv_lora_rank + qk_rope_head_dim", width, f"up to {MAX_WIDTH} (shared memory)")
        _require(page >= 16 and page == power_of_two(page), "page_size", page, "powers of two from 16")


@lru_cache(maxsize=1024)
def plan(config: Attention, tokens: int, sequences: int, max_pages: int, target: Gpu) -> Plan:
    """Launches for T = tokens rows of B = sequences, block_table [B, max_pages]. Lengths play no part."""
    if tokens == 0:
        return Plan(())
    size = "few" if power_of_two(config.heads) * cdiv(tokens, max(sequences, 1)) <= FEW else "many"
    tile, block_h, rows = _tile(config, size, target)
    programs = cdiv(tokens + sequences * (rows - 1), rows) * cdiv(config.heads, block_h)
    splits = _splits(programs, cdiv(max_pages * config.page_size, _block_n(config, tile)), tile.ctas, target)
    numbers = dict(tokens=tokens, sequences=sequences, max_pages=max_pages)
    launches = [append(config, numbers)]
    kernel = _attend_kernel(config, size, splits > 1, target)
    attend = dict(numbers, scale_log2e=config.softmax_scale * log2(e), output="partial" if splits > 1 else "attended")
    if splits > 1:
        attend["lse"] = "lse"
    tensors = ("q_latent", "q_pe", "cache", "block_table", "cached_lengths", "query_starts", "num_tokens")
    launches.append(bind(kernel, (programs, splits), **attend, **{n: n for n in tensors}))
    if splits == 1:
        return Plan(tuple(launches))
    combine, pairs = _combine_kernel(config, splits), tokens * config.heads
    grid = (pairs, config.kv_lora_rank // dict(combine.constexprs)["BLOCK_D"])
    launches.append(bind(combine, grid, partial="partial", lse="lse", attended="attended", splits=splits))
    workspace = place(("partial", "fp32", (pairs, splits, config.kv_lora_rank)), ("lse", "fp32", (pairs, splits)))
    return Plan(tuple(launches), workspace)


def kernels(config: Attention, target: Gpu) -> tuple[KernelSpec, ...]:
    """Every kernel that a plan of `config` can name, whatever its shapes."""
    sizes = ("few", "many") if power_of_two(config.heads) <= FEW else ("many",)
    attend = [_attend_kernel(config, size, split, target) for size in sizes for split in (False, True)]
    combine = [_combine_kernel(config, splits) for splits in COMBINE]
    return tuple(dict.fromkeys((append_kernel(config), *attend, *combine)))


def workspace_bytes(config: Attention, target: Gpu) -> int:
    """The most workspace that a plan of `config` needs, whatever its shapes: only split tiles need any."""
    pairs = MAX_PROGRAMS * target.num_sms * max(t.block_m for t in TILES[target.capability].values())  # times splits
    buffers = place(("partial", "fp32", (pairs, config.kv_lora_rank)), ("lse", "fp32", (pairs,)))
    return buffers[-1].offset + buffers[-1].size


def _tile(config: Attention, size: str, target: Gpu) -> tuple[Tile, int, int]:
    """The tile, and the heads and query rows in it."""
    packed = ".packed" if cache_elements(config.cache_format) == "i32" else ""
    tile = TILES[target.capability][size + packed]
    block_h = min(power_of_two(config.heads), tile.block_m)
    return tile, block_h, tile.block_m // block_h


def _block_n(config: Attention, tile: Tile) -> int:
    return min(tile.block_n, config.page_size)


def _splits(programs: int, blocks: int, ctas: int, target: Gpu) -> int:
    """How many programs share one tile's blocks of cached tokens: what would be fastest if all sequences filled their pages.

    `ctas` programs run on a multiprocessor at a time, so time goes in waves. Blocks are divided without rounding up: most
    sequences are shorter than their pages.
    """
    limit = min(MAX_SPLITS, blocks, MAX_PROGRAMS * target.num_sms // programs)

    def duration(splits: int) -> float:
        waves = cdiv(programs * splits, ctas * target.num_sms)
        return waves * (blocks / splits + SPLIT_COST) + (programs * splits / PARTIALS if splits > 1 else 0)

    return min(range(1, max(limit, 1) + 1), key=duration)


def _dims(config: Attention) -> dict[str, int]:
    rope = config.qk_rope_head_dim
    return dict(
        RANK=config.kv_lora_rank, ROPE=rope, ROPE_PAD=power_of_two(rope), PAGE=config.page_size, FORMAT=config.cache_format
    )  # fmt: skip


def append_kernel(config) -> KernelSpec:
    """The kernel that appends; `config` is an `Attention`, or `mla_prefill`'s."""
    x, cache = f"*{ELEMENTS[config.dtype]}", f"*{cache_elements(config.cache_format)}"
    arguments = (
        ("latent", x), ("k_pe", x), ("cache", cache), ("block_table", "*i32"), ("cached_lengths", "*i32"),
        ("query_starts", "*i32"), ("num_tokens", "*i32"), ("tokens", "i32"), ("sequences", "i32"), ("max_pages", "i32"),
    )  # fmt: skip
    constexprs = tuple((_dims(config) | dict(SEARCH=SEARCH_BLOCK)).items())
    return KernelSpec("mla_attention", "append", arguments, constexprs, 4, 1, "(tokens,)")


def append(config, numbers: dict[str, int]) -> Launch:
    """Its launch; numbers: tokens, sequences, max_pages."""
    tensors = ("latent", "k_pe", "cache", "block_table", "cached_lengths", "query_starts", "num_tokens")
    return bind(append_kernel(config), (numbers["tokens"],), **numbers, **{n: n for n in tensors})


def _attend_kernel(config: Attention, size: str, split: bool, target: Gpu) -> KernelSpec:
    tile, block_h, rows = _tile(config, size, target)
    q, cache = f"*{ELEMENTS[config.dtype]}", f"*{cache_elements(config.cache_format)}"
    arguments = (
        ("q_latent", q), ("q_pe", q), ("cache", cache), ("block_table", "*i32"), ("cached_lengths", "*i32"),
        ("query_starts", "*i32"), ("num_tokens", "*i32"), ("output", "*fp32" if split else q), ("lse", "*fp32"),
        ("scale_log2e", "fp32"), ("tokens", "i32"), ("sequences", "i32"), ("max_pages", "i32"),
    )  # fmt: skip
    constexprs = _dims(config) | dict(
        HEADS=config.heads, ROWS=rows, BLOCK_H=block_h, BLOCK_N=_block_n(config, tile),
        UNCHAIN=tile.unchain, STAGES=tile.stages, SEARCH=SEARCH_BLOCK,
    )  # fmt: skip
    if not split:
        arguments = tuple(a for a in arguments if a[0] != "lse")
        constexprs["lse"] = None
    grid = f"(cdiv(tokens + sequences * {rows - 1}, {rows}) * {cdiv(config.heads, block_h)}, splits)"
    return KernelSpec(
        "mla_attention", "attend", arguments, tuple(constexprs.items()), tile.warps, tile.stages, grid, tile.product,
        tile.spills_because,
    )  # fmt: skip


def _combine_kernel(config: Attention, splits: int) -> KernelSpec:
    """The smallest that takes `splits`."""
    most = min(n for n in COMBINE if n >= splits)
    block_d = min(COMBINE[most], config.kv_lora_rank)
    arguments = (
        ("partial", "*fp32"), ("lse", "*fp32"), ("attended", f"*{ELEMENTS[config.dtype]}"), ("splits", "i32"),
    )  # fmt: skip
    constexprs = (("RANK", config.kv_lora_rank), ("BLOCK_D", block_d), ("MAX_SPLITS", most))
    grid = f"(tokens * {config.heads}, {config.kv_lora_rank // block_d})"
    return KernelSpec("mla_attention", "combine", arguments, constexprs, 4, 1, grid)
