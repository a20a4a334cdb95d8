"""Block sizes of the attention kernels, one row per architecture. Strings and integers only.

A tile is block_m (query row, head) pairs of one sequence against block_n cached tokens at a time. "few" serves one token
of up to 16 heads, "many" everything else.

Products are mma.sync (HMMA), which every architecture has and whose M axis 16 heads fill: queries and two blocks of
tokens, one of them on its way, then take so little shared memory that Hopper and B200 run two programs on a
multiprocessor. The 64 rows of wgmma and tcgen05 need not be fed for 16 heads: they do 30 operations per byte of cache, and
mma.sync keeps up with memory. With 64 pairs a tile Hopper computes by wgmma while the next block loads. How fast B200 runs
mma.sync is not measured here.

Packed caches are decoded in registers, which takes room beside the sum: their tiles are ".packed". Eight warps then hold the
sum of 32 pairs. Sixteen pairs against 32 tokens run 1,140 instructions a warp on Hopper with int6 (594 with bfloat16).

Four warps share a block's tokens out among them, eight at a time: with 32 they compute nothing twice, with 16 the scores.
Shared memory holds stages - 1 blocks, with wgmma as many as stages.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    block_m: int
    block_n: int
    warps: int
    stages: int
    ctas: int  # programs that a multiprocessor holds at 512 + 64 elements a token: what plans count on
    product: str = "f16_sync"
    unchain: int = 0  # see kernel._score
    spills_because: str = ""


FEW = 16  # (query row, head) pairs per sequence on average that "few" serves at most

_A100 = "none in attend_shares, up to 136 bytes of stack; its sum, [32, 512] float32, takes half of the registers"
_DIRECT = "8 bytes where the output is direct, not used in the loop"
_RTX = "none in attend_shares, up to 160 bytes of stack; its sum, [32, 512] float32, takes half of the registers"
_HOPPER = "up to 56 bytes of stack, 13 reloads; its sum, [64, 512] float32, takes half of the registers"
_B200 = "64 bytes of stack in attend_shares, up to 200 in attend"
_PACKED = "up to 40 bytes of stack in attend_shares, up to 400 in attend"
_PACKED_HOPPER = "up to 128 bytes of stack in attend_shares, up to 512 in attend; its sum takes half the registers"
_RTX_PACKED = {
    "few.packed": Tile(16, 16, 4, 3, 1, spills_because=_PACKED),
    "many.packed": Tile(32, 16, 8, 2, 1, spills_because=_PACKED),
}
_PACKED_FEW = Tile(16, 32, 4, 2, 2, spills_because=_PACKED)
_PACKED_MANY = Tile(32, 32, 8, 2, 1, spills_because=_PACKED)
_RTX_MANY = Tile(32, 16, 4, 4, 1, spills_because=_RTX)  # in 99 KiB of shared memory
_ADA = {"few": Tile(16, 32, 4, 3, 1), "many": _RTX_MANY} | _RTX_PACKED
_RTX_BLACKWELL = {"few": Tile(16, 32, 4, 3, 1, spills_because=_DIRECT), "many": _RTX_MANY} | _RTX_PACKED
_BLACKWELL = {
    "few": Tile(16, 32, 4, 3, 2),
    "many": Tile(32, 32, 4, 3, 2, spills_because=_B200),
    "few.packed": _PACKED_FEW,
    "many.packed": _PACKED_MANY,
}
TILES: dict[int, dict[str, Tile]] = {
    80: {
        "few": Tile(16, 32, 4, 4, 1, spills_because=_DIRECT),
        "many": Tile(32, 16, 4, 3, 2, spills_because=_A100),
        "few.packed": Tile(16, 32, 4, 2, 1, spills_because=_PACKED),
        "many.packed": _PACKED_MANY,
    },
    86: _ADA,
    89: _ADA,
    90: {
        "few": Tile(16, 32, 4, 3, 2),
        "many": Tile(64, 32, 8, 3, 1, "f16", 1, _HOPPER),
        "few.packed": _PACKED_FEW,
        "many.packed": Tile(64, 32, 8, 2, 1, "f16", 1, _PACKED_HOPPER),
    },
    100: _BLACKWELL,
    103: _BLACKWELL,
    120: _RTX_BLACKWELL,
    121: _RTX_BLACKWELL,
}  # fmt: skip
