"""Block sizes of the expert kernels, one row per architecture. Strings and integers only.

A tile is BLOCK_M rows (token, choice) of one expert times BLOCK_N output channels, BLOCK_K of the sum at a time. swap 1
computes the transposed product, weights' rows on the M axis of the tensor cores: few tokens then fill them. "few" serves up
to 16 rows per expert on average, "some" up to 96, "many" the rest. Widths are for 2-byte elements: FP8 takes twice block_k.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    swap: int


FEW, SOME = 16, 96  # average rows per expert that "few" and "some" serve at most

_FEW = Tile(16, 64, 128, 4, 3, 1)
_SOME = Tile(64, 64, 64, 4, 3, 0)
TILES: dict[int, dict[str, Tile]] = {
    80: {"few": _FEW, "some": _SOME, "many": Tile(128, 64, 64, 8, 3, 0)},
    86: {"few": Tile(16, 64, 64, 4, 3, 1), "some": _SOME, "many": Tile(64, 64, 64, 4, 3, 0)},
    89: {"few": Tile(16, 64, 64, 4, 3, 1), "some": _SOME, "many": Tile(128, 64, 32, 8, 3, 0)},
    90: {"few": _FEW, "some": _SOME, "many": Tile(128, 128, 64, 8, 3, 0)},
    100: {"few": _FEW, "some": _SOME, "many": Tile(128, 128, 64, 8, 3, 0)},
    120: {"few": Tile(16, 64, 64, 4, 3, 1), "some": _SOME, "many": Tile(128, 64, 32, 8, 3, 0)},
    121: {"few": Tile(16, 64, 64, 4, 3, 1), "some": _SOME, "many": Tile(128, 64, 32, 8, 3, 0)},
}  # fmt: skip
