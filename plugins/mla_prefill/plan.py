"""Launch plans of `mla_prefill`: append, survey, then expand and attend for every segment of the cached tokens."""

from dataclasses import dataclass
from functools import lru_cache, partial
from math import e, log2

from latentrt.plugins.architecture import Gpu
from latentrt.plugins.launch.plan import (
    ELEMENT_BYTES,
    ELEMENTS,
    Buffer,
    KernelSpec,
    Launch,
    Plan,
    PlanError,
    bind,
    cdiv,
    place,
    power_of_two,
    require,
)
from latentrt.plugins.mla_attention.plan import (
    DTYPES,
    SEARCH_BLOCK,
    append,
    append_kernel,
    cache_elements,
    check_format,
)
from latentrt.plugins.mla_prefill.tiles import TILES

MAX_WIDTH = 320  # elements of a token's key and value in one head that the tiles leave shared memory for
SEGMENT_BYTES = 256 << 20  # of expanded keys and values that lie in the workspace at a time
MIN_SEGMENT = 1024  # slots
_require = partial(require, "mla_prefill")


@dataclass(frozen=True)
class Prefill:
    """The static part of an op call. dtype is that of the queries and the output; softmax_scale includes mscale^2."""

    heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    page_size: int
    dtype: str
    cache_format: str
    softmax_scale: float

    def __post_init__(self) -> None:
        _require(self.dtype in DTYPES, "dtype", self.dtype, DTYPES)
        for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "page_size"):
            value = getattr(self, name)
            _require(value >= 16 and value == power_of_two(value), name, value, "powers of two from 16")
        rope = self.qk_rope_head_dim
        _require(rope > 0 and rope % 16 == 0, "qk_rope_head_dim", rope, "multiples of 16")
        check_format("mla_prefill", self.cache_format, self.kv_lora_rank, rope)
        width = self.qk_nope_head_dim + power_of_two(rope) + self.v_head_dim
        names = "qk_nope_head_dim + qk_rope_head_dim + v_head_dim"
        _require(width <= MAX_WIDTH, names, width, f"up to {MAX_WIDTH} (shared memory)")


@lru_cache(maxsize=1024)
def plan(config: Prefill, tokens: int, sequences: int, max_pages: int, target: Gpu, segment: int | None = None) -> Plan:
    """Launches for T = tokens rows of B = sequences, block_table [B, max_pages]. Lengths play no part.

    `segment` sets the slots of a segment, a multiple of the tile's tokens; else SEGMENT_BYTES and the shapes do.
    """
    if tokens == 0:
        return Plan(())
    slots, segment = _segments(config, tokens, sequences, max_pages, target, segment)
    tile, states = TILES[target.capability], slots > segment
    numbers = dict(tokens=tokens, sequences=sequences, max_pages=max_pages)
    tiles = cdiv(tokens + min(sequences, tokens) * (tile.rows - 1), tile.rows)
    launches = [append(config, numbers), _launch(_survey_kernel(config, target), (1,), numbers)]
    expand, attend = _expand_kernel(config, target), _attend_kernel(config, states, target)
    for begin in range(0, slots, segment):
        where = numbers | dict(begin=begin, segment=segment, scale_log2e=config.softmax_scale * log2(e))
        launches.append(_launch(expand, (min(segment, slots - begin) // tile.tokens, config.heads), where))
        launches.append(_launch(attend, (tiles, config.heads), where))
    return Plan(tuple(launches), _workspace(config, tokens, segment, states))


def kernels(config: Prefill, target: Gpu) -> tuple[KernelSpec, ...]:
    """Every kernel that a plan of `config` can name, whatever its shapes."""
    attend = [_attend_kernel(config, states, target) for states in (False, True)]
    return (append_kernel(config), _survey_kernel(config, target), _expand_kernel(config, target), *attend)


def workspace_bytes(config: Prefill, tokens: int, sequences: int, max_pages: int, target: Gpu) -> int:
    """The most workspace that a plan of `config` needs for shapes up to these."""
    slots, segment = _segments(config, tokens, sequences, max_pages, target)
    buffers = _workspace(config, tokens, segment, slots > segment)
    return buffers[-1].offset + buffers[-1].size


def _segments(
    config: Prefill, tokens: int, sequences: int, max_pages: int, target: Gpu, segment: int | None = None
) -> tuple[int, int]:
    """The most slots that all sequences may take, and those of a segment."""
    width = TILES[target.capability].tokens
    slots = max(min(sequences, tokens), 1) * max(cdiv(max_pages * config.page_size, width), 1) * width
    if slots >= 2**31:
        raise PlanError(f"mla_prefill kernels: block_table [{sequences}, {max_pages}] is for {slots} tokens, accepted: < 2^31")
    slot_bytes = config.heads * (config.qk_nope_head_dim + config.v_head_dim) * ELEMENT_BYTES[ELEMENTS[config.dtype]]
    most = segment or max(power_of_two(SEGMENT_BYTES // slot_bytes + 1) // 2, MIN_SEGMENT)
    return slots, min(slots, most)


def _workspace(config: Prefill, tokens: int, segment: int, states: bool) -> tuple[Buffer, ...]:
    x, heads, value = ELEMENTS[config.dtype], config.heads, config.v_head_dim
    buffers = [
        ("keys", x, (heads, segment, config.qk_nope_head_dim)), ("values", x, (heads, segment, value)),
        ("keys_pe", x, (segment, power_of_two(config.qk_rope_head_dim))), ("used", "i32", (1,)),
    ]  # fmt: skip
    if states:
        buffers += [("sums", "fp32", (tokens, heads, value)), *((n, "fp32", (tokens, heads)) for n in ("maxima", "totals"))]
    return place(*buffers)


def _launch(kernel: KernelSpec, grid: tuple[int, ...], numbers: dict[str, int | float]) -> Launch:
    """Arguments that are no `numbers` are tensors or buffers of the same name."""
    return bind(kernel, grid, **{n: numbers.get(n, n) for n, _ in kernel.arguments})


def _dims(config: Prefill, target: Gpu) -> dict[str, int]:
    rope = config.qk_rope_head_dim
    return dict(
        NOPE=config.qk_nope_head_dim, ROPE=rope, ROPE_PAD=power_of_two(rope), VALUE=config.v_head_dim,
        TOKENS=TILES[target.capability].tokens, SEARCH=SEARCH_BLOCK,
    )  # fmt: skip


def _survey_kernel(config: Prefill, target: Gpu) -> KernelSpec:
    names = ("cached_lengths", "query_starts", "num_tokens", "used")
    arguments = (*((name, "*i32") for name in names), ("sequences", "i32"))
    constexprs = (("TOKENS", TILES[target.capability].tokens), ("SEARCH", SEARCH_BLOCK))
    return KernelSpec("mla_prefill", "survey", arguments, constexprs, 4, 1, "(1,)")


def _expand_kernel(config: Prefill, target: Gpu) -> KernelSpec:
    tile, x = TILES[target.capability], f"*{ELEMENTS[config.dtype]}"
    arguments = (
        ("w_uk", x), ("w_uv", x), ("cache", f"*{cache_elements(config.cache_format)}"), ("block_table", "*i32"),
        ("cached_lengths", "*i32"), ("query_starts", "*i32"), ("num_tokens", "*i32"), ("used", "*i32"), ("keys", x),
        ("keys_pe", x), ("values", x), ("begin", "i32"), ("segment", "i32"), ("sequences", "i32"), ("max_pages", "i32"),
    )  # fmt: skip
    constexprs = _dims(config, target) | dict(
        RANK=config.kv_lora_rank, PAGE=config.page_size, FORMAT=config.cache_format,
        BLOCK_K=min(tile.block_k, config.kv_lora_rank), STAGES=tile.expand_stages,
    )  # fmt: skip
    grid = f"(slots / {tile.tokens}, {config.heads}) of each segment"
    return KernelSpec(
        "mla_prefill", "expand", arguments, tuple(constexprs.items()), tile.expand_warps, tile.expand_stages, grid, "f16",
        tile.expand_spills_because,
    )  # fmt: skip


def _attend_kernel(config: Prefill, states: bool, target: Gpu) -> KernelSpec:
    tile, x = TILES[target.capability], f"*{ELEMENTS[config.dtype]}"
    arguments = (
        ("q_nope", x), ("q_pe", x), ("keys", x), ("keys_pe", x), ("values", x), ("cached_lengths", "*i32"),
        ("query_starts", "*i32"), ("num_tokens", "*i32"), ("used", "*i32"), ("attended", x), ("sums", "*fp32"),
        ("maxima", "*fp32"), ("totals", "*fp32"), ("scale_log2e", "fp32"), ("begin", "i32"), ("segment", "i32"),
        ("tokens", "i32"), ("sequences", "i32"),
    )  # fmt: skip
    constexprs = _dims(config, target) | dict(
        HEADS=config.heads, ROWS=tile.rows, BLOCK_N=tile.block_n, STAGES=tile.stages,
    )  # fmt: skip
    if not states:
        absent = ("sums", "maxima", "totals")
        arguments = tuple(a for a in arguments if a[0] not in absent)
        constexprs |= dict.fromkeys(absent)
    grid = f"(cdiv(tokens + min(sequences, tokens) * {tile.rows - 1}, {tile.rows}), {config.heads}) per segment"
    return KernelSpec("mla_prefill", "attend", arguments, tuple(constexprs.items()), tile.warps, tile.stages, grid, "f16")
