"""Block sizes of the prefill kernels, one row per architecture. Strings and integers only.

attend takes `rows` query rows of one sequence and head against block_n tokens at a time; expand computes `tokens` tokens of
one head, keys and values together, block_k elements of the latent at a time. Sequences begin at multiples of `tokens`, which
block_n divides. 128 rows fill two warp groups of 64 on Hopper, and one tile of the tensor cores on Blackwell.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    rows: int
    block_n: int
    warps: int
    stages: int
    tokens: int
    block_k: int
    expand_warps: int
    expand_stages: int
    expand_spills_because: str = ""


_SMALL = Tile(128, 32, 8, 3, 64, 32, 8, 3)  # 99 KiB of shared memory
_BLACKWELL = Tile(128, 64, 8, 3, 128, 64, 8, 3)  # 128 tokens at a time spill
TILES: dict[int, Tile] = {
    80: Tile(128, 32, 8, 4, 64, 64, 8, 3),
    86: _SMALL,
    89: _SMALL,
    90: Tile(128, 128, 8, 2, 128, 64, 8, 3, "16 bytes of stack where the cache is int4"),
    100: _BLACKWELL,
    103: _BLACKWELL,
    120: _SMALL,
    121: _SMALL,
}
