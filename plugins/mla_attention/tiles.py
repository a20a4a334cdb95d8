"""Block sizes of the attention kernels, one row per architecture. Strings and integers only.

A tile is BLOCK_M (query row, head) pairs of one sequence against BLOCK_N cached tokens at a time. "few" serves one token
of up to 16 heads, "many" everything else. swap 1 computes S^T = K Q^T and O^T = V^T P^T, which puts cached tokens and
latent elements on the M axis of the tensor cores: 16 heads then need no padding.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    block_m: int
    block_n: int
    warps: int
    stages: int
    swap: int


TILES: dict[int, dict[str, Tile]] = {
    80: {"few": Tile(16, 64, 4, 2, 1), "many": Tile(64, 32, 8, 2, 0)},
    86: {"few": Tile(16, 32, 4, 2, 1), "many": Tile(32, 16, 4, 2, 0)},
    89: {"few": Tile(16, 32, 4, 2, 1), "many": Tile(32, 16, 4, 2, 0)},
    90: {"few": Tile(16, 64, 4, 2, 1), "many": Tile(64, 64, 8, 2, 0)},
    100: {"few": Tile(16, 64, 4, 2, 1), "many": Tile(64, 64, 8, 2, 0)},
    120: {"few": Tile(16, 32, 4, 2, 1), "many": Tile(32, 16, 4, 2, 0)},
    121: {"few": Tile(16, 32, 4, 2, 1), "many": Tile(32, 16, 4, 2, 0)},
}  # fmt: skip
