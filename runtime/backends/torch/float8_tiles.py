"""Block sizes of the FP8 linears, one row per architecture that has FP8. `benchmarks/gpu/tune_linear.py` measures others.

One row is multiplied without tensor cores: programs of block_n channels, block_k weights of each at a time. A row that is
quantized on the way goes from warp to warp once a block, which is longer then. More rows are tiles: block_m rows times block_n
channels, block_k of the sum at a time. swap 1 puts the weights' rows on the M axis of the tensor cores, which is 64 wide at
least on Hopper and data-centre Blackwell. Where there are fewer tiles than `programs` for every multiprocessor, several
programs share the sum of a tile.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RowTile:
    block_n: int
    block_k: int
    warps: int


@dataclass(frozen=True)
class Tile:
    block_m: int
    block_n: int
    block_k: int
    programs: int
    warps: int
    stages: int
    swap: int


_ARCHITECTURES = (89, 90, 100, 103, 120, 121)
_SMALL = {16: Tile(16, 32, 256, 2, 4, 3, 0), 64: Tile(64, 64, 128, 1, 4, 3, 0), None: Tile(128, 128, 128, 0, 8, 3, 0)}
_LARGE = _SMALL | {16: Tile(16, 64, 128, 2, 4, 5, 1), 64: Tile(64, 64, 128, 1, 4, 4, 1)}
ROW_TILES = dict.fromkeys(_ARCHITECTURES, RowTile(4, 512, 4))
QUANTIZING_ROW_TILES = dict.fromkeys(_ARCHITECTURES, RowTile(4, 2048, 4))
TILES: dict[int, dict[int | None, Tile]] = {  # by the largest number of rows; None: any number
    89: _SMALL,
    90: _LARGE,
    100: _LARGE,
    103: _LARGE,
    120: _SMALL,
    121: _SMALL,
}
OWN_ROWS = 16  # up to so many rows these run, more take `torch._scaled_mm` where it scales rows


def tile_of(capability: int, rows: int) -> Tile:
    """The tile for this many rows."""
    return next(tile for limit, tile in TILES[capability].items() if limit is None or rows <= limit)
