"""Block sizes of the routing kernel, one row per architecture. Strings and integers only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    block_t: int  # tokens per program
    warps: int


TILES: dict[int, Tile] = {
    80: Tile(4, 4), 86: Tile(4, 4), 89: Tile(4, 4), 90: Tile(4, 4), 100: Tile(4, 4), 103: Tile(4, 4),
    120: Tile(4, 4), 121: Tile(4, 4),
}  # fmt: skip
