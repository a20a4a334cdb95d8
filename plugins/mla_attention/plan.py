"""Launch plans of `mla_attention`: append, then attend; or attend_shares and combine, where tiles do not fill the GPU."""

from dataclasses import dataclass
from functools import lru_cache, partial
from math import e, log2

from latentrt.plugins import cache_formats
from latentrt.plugins.architecture import Gpu
from latentrt.plugins.launch.plan import ELEMENTS, Buffer, KernelSpec, Launch, Plan, bind, cdiv, place, power_of_two, require
from latentrt.plugins.mla_attention.tiles import FEW, TILES, Tile

DTYPES = ("bfloat16", "float16")
CACHE_ELEMENTS = ("bf16", "fp16", "i32")
SEARCH_BLOCK = 128  # sequences looked at together when a program finds its own
MAX_WIDTH = 576  # elements of a cached token that the tiles leave shared memory for
COMBINE = {16: 128, 64: 64}  # slots that a kernel adds up at once, and elements of the rank it does so for
LEAST = 2  # blocks of tokens of a share: fewer are not worth a program
DIRECT = 2  # tiles for every program that the GPU holds, from which on a program takes a tile
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
    blocks_of_heads = cdiv(config.heads, block_h)
    tiles = cdiv(tokens + sequences * (rows - 1), rows)
    programs = _programs(tile, blocks_of_heads, target)
    numbers = dict(tokens=tokens, sequences=sequences, max_pages=max_pages)
    attend = dict(scale_log2e=config.softmax_scale * log2(e), sequences=sequences, max_pages=max_pages)
    names = ("q_latent", "q_pe", "cache", "block_table", "cached_lengths", "query_starts", "num_tokens")
    attend |= {n: n for n in names}
    launches = [append(config, numbers)]
    if tiles >= DIRECT * programs:
        kernel = _attend_kernel(config, size, target)
        launches.append(bind(kernel, (tiles * blocks_of_heads,), **attend, tokens=tokens, attended="attended"))
        return Plan(tuple(launches))
    found = dict(partial="partial", lse="lse", places="places")
    kernel = _shares_kernel(config, size, target)
    launches.append(bind(kernel, (programs * blocks_of_heads,), **attend, **found, programs=programs))
    blocks = cdiv(max_pages * config.page_size, _block_n(config, tile))
    combine = _combine_kernel(config, size, min(programs, cdiv(blocks, LEAST)) + 1, target)
    grid = (tokens * config.heads, config.kv_lora_rank // dict(combine.constexprs)["BLOCK_D"])
    launches.append(bind(combine, grid, **found, num_tokens="num_tokens", attended="attended"))
    slots = programs + min(tiles, tokens)
    return Plan(tuple(launches), _workspace(config, slots * blocks_of_heads * tile.block_m, tokens))


def kernels(config: Attention, target: Gpu) -> tuple[KernelSpec, ...]:
    """Every kernel that a plan of `config` can name, whatever its shapes."""
    found = [append_kernel(config)]
    for size in ("few", "many") if power_of_two(config.heads) <= FEW else ("many",):
        found += [_attend_kernel(config, size, target), _shares_kernel(config, size, target)]
        found += [_combine_kernel(config, size, slots, target) for slots in COMBINE]
    return tuple(dict.fromkeys(found))


def workspace_bytes(config: Attention, target: Gpu) -> int:
    """The most workspace that a plan of `config` needs, whatever its shapes: only shares need any."""
    most = 0
    for size in ("few", "many"):
        tile, block_h, rows = _tile(config, size, target)
        blocks_of_heads = cdiv(config.heads, block_h)
        programs = _programs(tile, blocks_of_heads, target)
        tiles = DIRECT * programs  # fewer than these
        buffers = _workspace(config, (programs + tiles) * blocks_of_heads * tile.block_m, tiles * rows)
        most = max(most, buffers[-1].offset + buffers[-1].size)
    return most


def _workspace(config: Attention, pairs: int, tokens: int) -> tuple[Buffer, ...]:
    return place(("partial", "fp32", (pairs, config.kv_lora_rank)), ("lse", "fp32", (pairs,)), ("places", "i32", (tokens, 2)))


def _tile(config: Attention, size: str, target: Gpu) -> tuple[Tile, int, int]:
    """The tile, and the heads and query rows in it."""
    packed = ".packed" if cache_elements(config.cache_format) == "i32" else ""
    tile = TILES[target.capability][size + packed]
    block_h = min(power_of_two(config.heads), tile.block_m)
    return tile, block_h, tile.block_m // block_h


def _programs(tile: Tile, blocks_of_heads: int, target: Gpu) -> int:
    """How many share the tokens of each block of heads: together what the GPU holds at a time."""
    return max(1, tile.ctas * target.num_sms // blocks_of_heads)


def _block_n(config: Attention, tile: Tile) -> int:
    return min(tile.block_n, config.page_size)


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


def _attend_kernel(config: Attention, size: str, target: Gpu) -> KernelSpec:
    _, block_h, rows = _tile(config, size, target)
    arguments = (*_operands(config), ("attended", f"*{ELEMENTS[config.dtype]}"), ("scale_log2e", "fp32"),
                 ("tokens", "i32"), ("sequences", "i32"), ("max_pages", "i32"))  # fmt: skip
    grid = f"(cdiv(tokens + sequences * {rows - 1}, {rows}) * {cdiv(config.heads, block_h)},)"
    return _product_kernel(config, "attend", arguments, {}, size, grid, target)


def _shares_kernel(config: Attention, size: str, target: Gpu) -> KernelSpec:
    _, block_h, _ = _tile(config, size, target)
    arguments = (*_operands(config), ("partial", "*fp32"), ("lse", "*fp32"), ("places", "*i32"), ("scale_log2e", "fp32"),
                 ("sequences", "i32"), ("max_pages", "i32"), ("programs", "i32"))  # fmt: skip
    grid = f"(programs * {cdiv(config.heads, block_h)},)"
    return _product_kernel(config, "attend_shares", arguments, dict(LEAST=LEAST), size, grid, target)


def _operands(config: Attention) -> list[tuple[str, str]]:
    q, cache = f"*{ELEMENTS[config.dtype]}", f"*{cache_elements(config.cache_format)}"
    integers = ("block_table", "cached_lengths", "query_starts", "num_tokens")
    return [("q_latent", q), ("q_pe", q), ("cache", cache), *((name, "*i32") for name in integers)]


def _product_kernel(
    config: Attention, function: str, arguments: tuple, constants: dict[str, int], size: str, grid: str, target: Gpu
) -> KernelSpec:
    tile, block_h, rows = _tile(config, size, target)
    constexprs = _dims(config) | constants | dict(
        HEADS=config.heads, ROWS=rows, BLOCK_H=block_h, BLOCK_N=_block_n(config, tile),
        UNCHAIN=tile.unchain, STAGES=tile.stages, SEARCH=SEARCH_BLOCK,
    )  # fmt: skip
    return KernelSpec(
        "mla_attention", function, arguments, tuple(constexprs.items()), tile.warps, tile.stages, grid, tile.product,
        tile.spills_because,
    )  # fmt: skip


def _combine_kernel(config: Attention, size: str, slots: int, target: Gpu) -> KernelSpec:
    """The one that adds up `slots` at once, or as many as there is a kernel for."""
    _, block_h, rows = _tile(config, size, target)
    most = next((n for n in COMBINE if n >= slots), max(COMBINE))
    block_d = min(COMBINE[most], config.kv_lora_rank)
    arguments = (
        ("partial", "*fp32"), ("lse", "*fp32"), ("places", "*i32"), ("num_tokens", "*i32"),
        ("attended", f"*{ELEMENTS[config.dtype]}"),
    )  # fmt: skip
    constexprs = dict(
        HEADS=config.heads, RANK=config.kv_lora_rank, ROWS=rows, BLOCK_H=block_h, BLOCK_D=block_d, SLOTS=most
    )  # fmt: skip
    grid = f"(tokens * {config.heads}, {config.kv_lora_rank // block_d})"
    return KernelSpec("mla_attention", "combine", arguments, tuple(constexprs.items()), 4, 1, grid)
