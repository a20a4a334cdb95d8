"""Block sizes of the expert kernels, one row per architecture. Strings and integers only.

A tile is block_m rows (token, choice) of one expert, times block_n channels of gate and as many of up, or down_n channels
of down, block_k elements of the sum at a time. "few" serves up to 16 rows per expert on average, "some" up to 96, "many"
the rest. FP8 takes twice block_k, which is as many bytes. swap 1 computes the transposed product: weights' rows then lie on
the M axis of the tensor cores, which is 64 wide at least on Hopper and Blackwell; elsewhere it is 16, and 16 rows fill it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    block_m: int
    block_n: int
    down_n: int
    block_k: int
    warps: int
    stages: int
    swap: int


FEW, SOME = 16, 96  # average rows per expert that "few" and "some" serve at most

_FEW = Tile(16, 64, 64, 64, 4, 4, 0)
_SOME = Tile(64, 64, 128, 64, 4, 3, 0)
_MANY = Tile(128, 64, 128, 64, 8, 3, 0)
_SMALL = {"few": _FEW, "some": _SOME, "many": _MANY}  # 99 KiB of shared memory
_HOPPER = {"few": Tile(16, 64, 64, 128, 4, 3, 1), "some": _SOME, "many": Tile(128, 64, 128, 64, 8, 4, 0)}
TILES: dict[int, dict[str, Tile]] = {
    80: _SMALL | {"few": Tile(16, 64, 64, 128, 4, 4, 0)},
    86: _SMALL,
    89: _SMALL,
    90: _HOPPER,
    100: _HOPPER,
    120: _SMALL,
    121: _SMALL,
}
