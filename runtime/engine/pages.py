"""Which pages of the latent cache belong to which sequence. The tensors themselves belong to the backend.

Page 0 is scratch: padding rows point there. Pages are taken as a sequence grows and given back when it ends.
"""

import numpy as np


class CacheFullError(RuntimeError):
    """No free page is left."""


class LatentCache:
    """Bookkeeping of `num_pages` pages of `page_size` tokens; page 0 is never given out."""

    def __init__(self, num_pages: int, page_size: int):
        if num_pages < 2:
            raise ValueError(f"a latent cache needs 2 pages or more (page 0 is scratch), got {num_pages}")
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages - 1, 0, -1))
        self._pages: dict[int, list[int]] = {}

    @property
    def free_tokens(self) -> int:
        """Tokens that fit into the pages still free."""
        return len(self._free) * self.page_size

    @property
    def capacity(self) -> int:
        """Tokens that fit in all."""
        return (self.num_pages - 1) * self.page_size

    def reserve(self, sequence: int, length: int) -> None:
        """Makes room for the first `length` tokens of a sequence. Raises CacheFullError, taking nothing, if it does not fit."""
        pages = self._pages.setdefault(sequence, [])
        needed = -(-length // self.page_size) - len(pages)
        if needed > len(self._free):
            raise CacheFullError(
                f"sequence {sequence} needs {needed} more pages of {self.page_size} tokens, {len(self._free)} are free"
            )
        pages.extend(self._free.pop() for _ in range(needed))

    def fits(self, sequence: int, length: int) -> bool:
        """Whether `reserve` would succeed."""
        return -(-length // self.page_size) - len(self._pages.get(sequence, [])) <= len(self._free)

    def truncate(self, sequence: int, length: int) -> None:
        """Gives back the pages past the first `length` tokens of a sequence."""
        pages = self._pages.get(sequence, [])
        kept = -(-length // self.page_size)
        self._free.extend(reversed(pages[kept:]))
        del pages[kept:]

    def release(self, sequence: int) -> None:
        """Gives a sequence's pages back."""
        self._free.extend(reversed(self._pages.pop(sequence, [])))

    def block_table(self, sequences: list[int]) -> np.ndarray:
        """[B, max_pages] int32; entries past a sequence's last page are 0."""
        rows = [self._pages.get(s, []) for s in sequences]
        table = np.zeros((len(rows), max([1, *map(len, rows)])), np.int32)
        for row, pages in zip(table, rows, strict=True):
            row[: len(pages)] = pages
        return table
