"""Block sizes of the expert kernels, one row per architecture. Strings and integers only.

A tile is block_m rows (token, choice) of one expert, times block_n channels of gate and as many of up, or down_n channels
of down, block_k elements of the sum at a time. "few" serves up to 16 rows per expert on average, "some" up to 96, "many"
the rest. FP8 takes twice block_k, which is as many bytes, and the tile "... float8" where there is one. swap 1 computes the
transposed product: weights' rows then lie on the M axis of the tensor cores, which is 64 wide at least on Hopper and
Blackwell; elsewhere it is 16, and 16 rows fill it.

int4 takes the tile "... int4", and as block_k the inputs that share a scale. Its products are transposed: warps then share the
weights' rows out, and each unpacks its own, on their way from shared memory to the tensor cores' registers. Sums of a block
stand beside those of all blocks, so that tiles are smaller. On Hopper 128 rows are worth unpacking weights into shared memory.

Hopper and B200 multiply faster than L2 delivers: the wide "many" does 85 floating-point operations per byte of bfloat16,
128 x (64 + 64) does 64. It takes 192 KiB and up to 190 registers (bfloat16). FP8 on Hopper keeps 128 channels of down: 256
would spill 160 bytes a thread in the loop.
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
    spills_because: str = ""


SIZES = ("few", "some", "many")
FEW, SOME = 16, 96  # average rows per expert that "few" and "some" serve at most

_FEW = Tile(16, 64, 64, 64, 4, 4, 0)
_SOME = Tile(64, 64, 128, 64, 4, 3, 0)
_MANY = Tile(128, 64, 128, 64, 8, 3, 0)
_SMALL = {"few": _FEW, "some": _SOME, "many": _MANY}  # 99 KiB of shared memory
_SPILLS = "16 bytes outside the loop of gate_up, whose FP8 products are added in a second set of 128 registers; down has none"
_RELOAD = "8 bytes, stored and reloaded once by `down` of a single token at 1536 x 5120"
_RTX_BLACKWELL = _SMALL | {"few float8": Tile(16, 64, 64, 64, 4, 4, 0, _RELOAD)}
_INT4 = {
    "few int4": Tile(16, 64, 64, 0, 4, 4, 1),
    "some int4": Tile(64, 64, 128, 0, 8, 3, 1),
    "many int4": Tile(64, 64, 128, 0, 8, 3, 1),
}
_BUSY = "88 bytes in the loop of gate_up: the plain product, which has none, would unpack weights in several warps again"
_INT4_RTX_BLACKWELL = _INT4 | {"some int4": Tile(32, 64, 64, 0, 4, 3, 1), "many int4": Tile(64, 64, 128, 0, 8, 3, 1, _BUSY)}
_INT4_LARGE = _INT4 | {"some int4": Tile(64, 64, 64, 0, 4, 3, 1), "many int4": Tile(64, 128, 128, 0, 8, 3, 1)}
_INT4_HOPPER = _INT4_LARGE | {"many int4": Tile(128, 64, 128, 0, 8, 3, 0)}
_LARGE = {"few": Tile(16, 64, 64, 128, 4, 3, 1), "some": _SOME, "many": Tile(128, 128, 256, 64, 8, 4, 0)}
_HOPPER = _LARGE | {"many float8": Tile(128, 128, 128, 64, 8, 4, 0, _SPILLS)}
TILES: dict[int, dict[str, Tile]] = {
    80: _SMALL | _INT4 | {"few": Tile(16, 64, 64, 128, 4, 4, 0)},
    86: _SMALL | _INT4,
    89: _SMALL | _INT4,
    90: _HOPPER | _INT4_HOPPER,
    100: _LARGE | _INT4_LARGE,
    103: _LARGE | _INT4_LARGE,
    120: _RTX_BLACKWELL | _INT4_RTX_BLACKWELL,
    121: _RTX_BLACKWELL | _INT4_RTX_BLACKWELL,
}
