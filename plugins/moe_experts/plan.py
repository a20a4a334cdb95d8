"""Launch plans of `moe_experts`: [sort,] [quantize or halve,] gate and up, [quantize,] down, combine."""

from dataclasses import dataclass
from functools import lru_cache, partial

from latentrt.plugins import architecture
from latentrt.plugins.architecture import Gpu
from latentrt.plugins.launch.plan import (
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
from latentrt.plugins.moe_experts.tiles import FEW, SIZES, SOME, TILES, Tile

DTYPES = ("bfloat16", "float16")
BLOCKS = (128, 64, 32)  # inputs that share a scale of int4 weights
LAYOUTS = ("concatenated", "interleaved")
SORT_BLOCK = 1024  # ids a program looks at together
COMBINE_BLOCK = 1024
_require = partial(require, "moe_experts")


@dataclass(frozen=True)
class Experts:
    """The static part of an op call. dtype is that of x and y; weights "float8_e4m3fn" come with channel scales, "int8", which
    holds `packed` = 2 elements of 4 bits, with scales of blocks.

    gate_up_blocks, down_blocks: blocks of inputs that have a scale each. total_experts: what rows are spread over, where other
    ranks have the rest of them.
    """

    num_experts: int  # of the local slice
    hidden_size: int
    moe_intermediate_size: int
    top_k: int
    dtype: str
    weights: str
    first_expert: int
    gate_up_layout: str
    gate_up_blocks: int = 1
    down_blocks: int = 1
    total_experts: int = 0
    packed: int = 1

    def __post_init__(self) -> None:
        _require(self.dtype in DTYPES, "dtype", self.dtype, DTYPES)
        accepted = (self.dtype, "float8_e4m3fn", "int8")
        _require(self.weights in accepted, "weights", self.weights, accepted)
        _require(self.packed == 1 + self.int4, "packed", self.packed, f"{1 + self.int4} with {self.weights} weights")
        _require(self.gate_up_layout in LAYOUTS, "gate_up_layout", self.gate_up_layout, LAYOUTS)
        for name in ("hidden_size", "moe_intermediate_size"):
            _require(getattr(self, name) % 16 == 0, name, getattr(self, name), "multiples of 16")
        for name, inputs in (("gate_up_blocks", self.hidden_size), ("down_blocks", self.moe_intermediate_size)):
            blocks = getattr(self, name)
            fits = inputs / blocks in BLOCKS if self.int4 else blocks == 1
            _require(fits, name, blocks, f"{inputs} inputs / {BLOCKS}" if self.int4 else "1, a scale per output channel")

    @property
    def float8(self) -> bool:
        return self.weights == "float8_e4m3fn"

    @property
    def int4(self) -> bool:
        return self.weights == "int8"

    @property
    def scaled(self) -> bool:
        return self.float8 or self.int4


@lru_cache(maxsize=1024)
def plan(config: Experts, tokens: int, target: Gpu) -> Plan:
    """Launches for x [T, hidden_size], T = tokens, on the worst-case number of tiles that T rows can make."""
    _check_float8(config, target)
    if tokens == 0:
        return Plan(())
    pairs = tokens * config.top_k
    average, one = cdiv(pairs, config.total_experts or config.num_experts), tokens == 1
    size = "few" if one or average <= FEW else "some" if average <= SOME else "many"
    tile = _tile(config, size, target)
    by_pair = pairs <= pairs // tile.block_m + config.num_experts
    tiles = pairs if one or by_pair else pairs // tile.block_m + config.num_experts
    gate_up, down = _gate_up_kernel(config, size, target, one), _down_kernel(config, size, target, one)
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    if one:
        sort, pairs_of = [], dict(topk_ids="topk_ids", first_expert=config.first_expert)
    else:
        pairs_of = dict(order="order", table="table")
        numbers = dict(pairs=pairs, tiles=tiles, by_pair=int(by_pair), first_expert=config.first_expert)
        kernel = _sort_kernel(config, size, target)
        sort = [bind(kernel, (config.num_experts,), topk_ids="topk_ids", **pairs_of, **numbers)]
    launches = [
        *sort,
        *_quantize(config, "x", hidden, tokens),
        *_halve(config, size, tokens),
        bind(gate_up, (tiles * cdiv(inner, tile.block_n),), **_operands(config, _rows(config, size), "gate_up"), output="inner",
             **pairs_of),
        *_quantize(config, "inner", inner, pairs, {} if one else dict(table="table", tiles=tiles)),
        bind(down, (tiles * cdiv(hidden, tile.down_n),), **_operands(config, "inner", "down"), output="outer", **pairs_of),
        bind(_combine_kernel(config), (tokens, cdiv(hidden, COMBINE_BLOCK)), outer="outer", topk_ids="topk_ids",
             topk_weights="topk_weights", y="y", first_expert=config.first_expert),
    ]  # fmt: skip
    return Plan(tuple(launches), _workspace(config, tokens))


def workspace_bytes(config: Experts, tokens: int, target: Gpu) -> int:
    """The most workspace that a plan of `config` needs for up to `tokens` rows."""
    _check_float8(config, target)
    return max(b.offset + b.size for b in _workspace(config, tokens))


def kernels(config: Experts, target: Gpu) -> tuple[KernelSpec, ...]:
    """Every kernel that a plan of `config` can name, whatever its shapes."""
    _check_float8(config, target)
    found = [_combine_kernel(config)]
    if config.float8:
        found += [_quantize_kernel(config, n, False) for n in (config.hidden_size, config.moe_intermediate_size)]
        found.append(_quantize_kernel(config, config.moe_intermediate_size, True))
    if config.int4:
        found.append(_halve_kernel(config))
    found += [make(config, "few", target, True) for make in (_gate_up_kernel, _down_kernel)]
    for size in SIZES:
        found += [make(config, size, target) for make in (_sort_kernel, _gate_up_kernel, _down_kernel)]
    return tuple(dict.fromkeys(found))


def _tile(config: Experts, size: str, target: Gpu) -> Tile:
    row = TILES[target.capability]
    return row.get(f"{size} {'float8' if config.float8 else 'int4'}", row[size]) if config.scaled else row[size]


def _check_float8(config: Experts, target: Gpu) -> None:
    if config.float8 and not architecture.get(target.capability).float8:
        raise PlanError(f"moe_experts kernels: sm_{target.capability} has no FP8, accepted: weights of {config.dtype}")


def _workspace(config: Experts, tokens: int) -> tuple[Buffer, ...]:
    """Grows with `tokens`; the table has room for the smallest tiles."""
    x, pairs = ELEMENTS[config.dtype], tokens * config.top_k
    tiles = pairs // FEW + config.num_experts
    buffers = [
        ("order", "i32", (pairs,)), ("table", "i32", (tiles, 4)),
        ("inner", x, (pairs, config.moe_intermediate_size)), ("outer", x, (pairs, config.hidden_size)),
    ]  # fmt: skip
    if config.float8:
        for name, rows, columns in (
            ("x", tokens, config.hidden_size),
            ("inner", pairs, config.moe_intermediate_size),
        ):
            buffers += [(f"{name}_float8", "fp8e4nv", (rows, columns)), (f"{name}_scale", "fp32", (rows,))]
    if config.int4:
        buffers.append(("x_halves", x, (tokens, config.hidden_size)))
    return place(*buffers)


def _operands(config: Experts, rows: str, weight: str) -> dict[str, str]:
    if config.float8:
        scales = dict(row_scale=f"{rows}_scale", channel_scale=f"{weight}_scale")
        return dict(rows=f"{rows}_float8", weight=f"{weight}_proj", **scales)
    if config.int4:
        return dict(rows=rows, weight=f"{weight}_proj", channel_scale=f"{weight}_scale")
    return dict(rows=rows, weight=f"{weight}_proj")


def _quantize(config: Experts, name: str, columns: int, rows: int, table: dict = {}) -> list[Launch]:
    """Rows of `name` -> FP8 and their scales. `table`: what tells how many of them hold something, where they are sorted."""
    if not config.float8:
        return []
    kernel = _quantize_kernel(config, columns, bool(table))
    return [bind(kernel, (rows,), source=name, values=f"{name}_float8", scales=f"{name}_scale", **table)]


def _quantize_kernel(config: Experts, columns: int, of_table: bool) -> KernelSpec:
    table = (("table", "*i32"), ("tiles", "i32"))
    arguments = (("source", f"*{ELEMENTS[config.dtype]}"), ("values", "*fp8e4nv"), ("scales", "*fp32"))
    constexprs = () if of_table else tuple((name, None) for name, _ in table)
    constexprs += ("COLUMNS", columns), ("BLOCK", power_of_two(columns))
    return KernelSpec("moe_experts", "quantize", arguments + table * of_table, constexprs, 4, 1, "(rows,)")


def _rows(config: Experts, size: str) -> str:
    """What gate_up reads: few rows are split in registers, which spares a launch; more would take too many of them."""
    return "x" if size == "few" or not config.int4 else "x_halves"


def _halve(config: Experts, size: str, tokens: int) -> list[Launch]:
    if _rows(config, size) == "x":
        return []
    return [bind(_halve_kernel(config), (tokens,), source="x", target="x_halves")]


def _halve_kernel(config: Experts) -> KernelSpec:
    x, columns = f"*{ELEMENTS[config.dtype]}", config.hidden_size
    constexprs = (("COLUMNS", columns), ("BLOCK_K", columns // config.gate_up_blocks), ("BLOCK", power_of_two(columns)))
    return KernelSpec("moe_experts", "halve", (("source", x), ("target", x)), constexprs, 4, 1, "(tokens,)")


def _sort_kernel(config: Experts, size: str, target: Gpu) -> KernelSpec:
    arguments = (
        ("topk_ids", "*i32"), ("order", "*i32"), ("table", "*i32"), ("pairs", "i32"), ("tiles", "i32"),
        ("by_pair", "i32"), ("first_expert", "i32"),
    )  # fmt: skip
    block_m = _tile(config, size, target).block_m
    constexprs = (("EXPERTS", config.num_experts), ("BLOCK_M", block_m), ("BLOCK", SORT_BLOCK))
    return KernelSpec("moe_experts", "sort", arguments, constexprs, 4, 1, f"({config.num_experts},)")


def _product_kernel(config: Experts, function: str, tile: Tile, one: bool, sizes: dict[str, int]) -> KernelSpec:
    """gate_up or down, `one`: of a single token, unsorted; `sizes` holds the constants that only one of them has."""
    x, w = ELEMENTS[config.dtype], ELEMENTS[config.weights]
    types = dict(
        rows=f"*{w if config.float8 else x}", weight=f"*{w}", output=f"*{x}", order="*i32", table="*i32", topk_ids="*i32",
        first_expert="i32", row_scale="*fp32", channel_scale="*fp32",
    )  # fmt: skip
    absent = ["order", "table"] if one else ["topk_ids", "first_expert"]
    absent += [name for name, here in (("row_scale", config.float8), ("channel_scale", config.scaled)) if not here]
    arguments = tuple((name, kind) for name, kind in types.items() if name not in absent)
    inner, hidden = config.moe_intermediate_size, config.hidden_size
    columns, block_n = (inner, tile.block_n) if function == "gate_up" else (hidden, tile.down_n)
    block_k = tile.block_k * (2 if config.float8 else 1)
    if config.int4:
        block_k = hidden // config.gate_up_blocks if function == "gate_up" else inner // config.down_blocks
    constexprs = sizes | dict.fromkeys(absent) | dict(
        EXPERTS=config.num_experts, HIDDEN=hidden, INNER=inner, PACKED=config.packed, BLOCK_M=tile.block_m, BLOCK_N=block_n,
        BLOCK_K=block_k, SWAP=tile.swap, STAGES=tile.stages,
    )  # fmt: skip
    grid = f"({config.top_k if one else 'tiles'} * {cdiv(columns, block_n)},)"
    kind = "fp8" if config.float8 else "f16"
    return KernelSpec(
        "moe_experts", function, arguments, tuple(constexprs.items()), tile.warps, tile.stages, grid, kind, tile.spills_because
    )  # fmt: skip


def _gate_up_kernel(config: Experts, size: str, target: Gpu, one: bool = False) -> KernelSpec:
    sizes = dict(TOP_K=config.top_k, INTERLEAVED=int(config.gate_up_layout == "interleaved"))
    sizes |= dict(SPLIT=int(config.int4 and size == "few"), DOWN_K=config.moe_intermediate_size // config.down_blocks)
    return _product_kernel(config, "gate_up", _tile(config, size, target), one, sizes)


def _down_kernel(config: Experts, size: str, target: Gpu, one: bool = False) -> KernelSpec:
    return _product_kernel(config, "down", _tile(config, size, target), one, {})


def _combine_kernel(config: Experts) -> KernelSpec:
    x = f"*{ELEMENTS[config.dtype]}"
    arguments = (
        ("outer", x), ("topk_ids", "*i32"), ("topk_weights", "*fp32"), ("y", x), ("first_expert", "i32"),
    )  # fmt: skip
    constexprs = (
        ("EXPERTS", config.num_experts), ("HIDDEN", config.hidden_size), ("TOP_K", config.top_k),
        ("BLOCK", min(COMBINE_BLOCK, power_of_two(config.hidden_size))),
    )  # fmt: skip
    grid = f"(tokens, {cdiv(config.hidden_size, COMBINE_BLOCK)})"
    return KernelSpec("moe_experts", "combine", arguments, constexprs, 4, 1, grid)
