"""The schedulers of all ranks: each has its own sequences and cache, and their steps go together."""

from operator import attrgetter

from latentrt.runtime.engine.scheduler import Scheduled, Scheduler
from latentrt.runtime.engine.sequence import Sequence


class Schedulers:
    """One scheduler a rank. A request goes where it will have its first token soonest: by what is to be computed there before
    it, and by what that rank's cache knows of it already. One that waits moves to a rank that has nothing to do."""

    def __init__(self, ranks: list[Scheduler]):
        self.ranks = ranks

    def add(self, sequence: Sequence) -> None:
        """Queues a request on a rank; its prompt must fit the limits."""
        self._best(sequence).add(sequence)

    def schedule(self) -> list[list[Scheduled]]:
        """Every rank's part of the next step; all are empty if nothing can run."""
        for rank in self.ranks:
            rank.admit()
        if len(self.ranks) > 1:
            self._level()
        decodes = any(rank.decodes for rank in self.ranks)
        return [rank.plan(decodes) for rank in self.ranks]

    def shrink(self, plans: list[list[Scheduled]]) -> bool:
        """See Scheduler.shrink: of the rank with the most rows."""
        largest = max(range(len(plans)), key=lambda k: sum(part.rows for part in plans[k]))
        return self.ranks[largest].shrink(plans[largest])

    @property
    def running(self) -> list[Sequence]:
        """Sequences that take part in steps."""
        return [sequence for rank in self.ranks for sequence in rank.running]

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences whose turn has not come."""
        return [sequence for rank in self.ranks for sequence in rank.waiting]

    @property
    def max_running(self) -> int:
        """How many sequences a step may have."""
        return sum(rank.max_running for rank in self.ranks)

    @property
    def capacity(self) -> int:
        """Tokens that one sequence may have in a cache."""
        return min(rank.cache.capacity for rank in self.ranks)

    @property
    def cache_usage(self) -> float:
        """The share of all latent caches that is in use, 0 to 1."""
        return 1 - self.total("cache.free_tokens") / self.total("cache.capacity")

    def total(self, name: str) -> int:
        """The sum over the ranks of what they count under a name, such as "asked_tokens" or "cache.capacity"."""
        return sum(attrgetter(name)(rank) for rank in self.ranks)

    def _best(self, sequence: Sequence) -> Scheduler:
        if len(self.ranks) == 1:
            return self.ranks[0]
        return min(self.ranks, key=lambda rank: (rank.backlog + rank.missing(sequence), -rank.cache.free_tokens))

    def _level(self) -> None:
        """Ranks that have nothing to do take what waits elsewhere."""
        for idle in [rank for rank in self.ranks if not rank.running and not rank.waiting]:
            fullest = max(self.ranks, key=lambda rank: len(rank.waiting))
            if fullest.waiting:
                idle.add(fullest.give_up_waiting())
                idle.admit()
