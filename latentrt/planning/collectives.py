"""What ranks send each other for the rows of one layer with experts, in bytes, and how long that takes.

This project gathers all rows everywhere and scatters sums (docs/many-gpus.md); an all-to-all dispatch sends a row only to the
ranks that hold one of its experts, and back. "A row's bytes" cross links on their way to all ranks together. Since every rank
has equally many rows, that times its own rows is also what each rank receives.
"""

from dataclasses import dataclass

from latentrt.export.models.base import Config

HIDDEN = 2  # bytes of an element of hidden rows, bfloat16
CHOICE = 4 + 4  # bytes of an expert's id (int32) and weight (float32)
ALL_TO_ALL = "all-to-all"
EXCHANGES = {"gather": 2, "gather-float32": 4, ALL_TO_ALL: 2}  # bytes of an element of sums; the first is what is built


def gathered_bytes(config: Config, ranks: int) -> int:
    """A row's bytes when it goes to all other ranks."""
    return (ranks - 1) * config.hidden_size * HIDDEN


def choices_bytes(config: Config, ranks: int) -> int:
    """The same of its experts' ids and weights."""
    return (ranks - 1) * config.num_experts_per_tok * CHOICE


def summed_bytes(config: Config, ranks: int, exchange: str) -> int:
    """A row's bytes when every other rank sends a part of its sum."""
    return (ranks - 1) * config.hidden_size * EXCHANGES[exchange]


def dispatched_bytes(config: Config, reached: float) -> float:
    """A row's bytes when it goes to `reached` other ranks and a part of its sum comes back from each."""
    return reached * config.hidden_size * (HIDDEN + EXCHANGES[ALL_TO_ALL])


@dataclass(frozen=True)
class Link:
    """bytes_per_second: that a GPU receives; latency: seconds of a collective that moves nothing."""

    bytes_per_second: float
    latency: float

    def seconds(self, size: float, collectives: int) -> float:
        """Of so many collectives, one after another, in which a rank receives `size` bytes in all."""
        return size / self.bytes_per_second + collectives * self.latency


@dataclass(frozen=True)
class Exchange:
    """How the ranks of a model share rows and sums. name: of EXCHANGES; reached: see `dispatched_bytes`."""

    config: Config
    ranks: int
    name: str
    reached: float

    def row_bytes(self) -> float:
        """A row's bytes in one layer."""
        if self.name == ALL_TO_ALL:
            return dispatched_bytes(self.config, self.reached)
        gathered = gathered_bytes(self.config, self.ranks) + choices_bytes(self.config, self.ranks)
        return gathered + summed_bytes(self.config, self.ranks, self.name)

    def seconds(self, link: Link, padded: int, rows: int) -> float:
        """Of one layer: ranks gather `padded` rows each, but dispatch the fullest one's own `rows`."""
        if self.ranks == 1:
            return 0.0
        if self.name == ALL_TO_ALL:
            return link.seconds(rows * self.row_bytes(), 2)  # there and back
        return link.seconds(padded * self.row_bytes(), 4)  # rows, ids and weights are gathered, sums are scattered
