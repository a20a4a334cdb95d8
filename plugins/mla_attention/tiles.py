"""Block sizes of the attention kernels, one row per architecture. Strings and integers only.

A tile is block_m (query row, head) pairs of one sequence against block_n cached tokens at a time. "few" serves one token
of up to 16 heads, "many" everything else. swap 1 computes S^T = K Q^T and O^T = V^T P^T, which puts cached tokens and
latent elements on the M axis of the tensor cores: that axis is 64 wide at least on Hopper and Blackwell; elsewhere it is
16, and 16 heads fill it. The pipeline gives a load that waits for a page number half of its stages, so below 9.0 five
stages hold two blocks of tokens in shared memory.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    block_m: int
    block_n: int
    warps: int
    stages: int
    swap: int
    spills_because: str = ""


FEW = 16  # (query row, head) pairs per sequence on average that "few" serves at most

_HOPPER_SPILLS = (
    "a [64, 512] float32 sum takes 128 registers; 29 of the loop's 1204 instructions are spills, smaller tiles lose wgmma"
)
_BLACKWELL_SPILLS = (
    "49 of the loop's 2719 instructions are spills; 16 heads a tile spill none but read the cache twice as often"
)
_RTX_SPILLS = "8 bytes where the output is direct, reloaded twice outside the loop"
_SMALL = {"few": Tile(16, 32, 4, 5, 0), "many": Tile(32, 16, 8, 5, 0)}  # 99 KiB of shared memory
_RTX_BLACKWELL = _SMALL | {"few": Tile(16, 32, 4, 5, 0, _RTX_SPILLS)}
TILES: dict[int, dict[str, Tile]] = {
    80: {"few": Tile(16, 32, 4, 7, 0), "many": Tile(32, 32, 8, 5, 0)},
    86: _SMALL,
    89: _SMALL,
    90: {"few": Tile(16, 64, 8, 2, 1), "many": Tile(64, 64, 8, 2, 0, _HOPPER_SPILLS)},
    100: {"few": Tile(16, 64, 8, 2, 1), "many": Tile(32, 64, 8, 2, 1, _BLACKWELL_SPILLS)},
    120: _RTX_BLACKWELL,
    121: _RTX_BLACKWELL,
}
