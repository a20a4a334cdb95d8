"""Which pages of the latent cache belong to which sequence, and which tokens lie in pages that nobody uses any more.

Page 0 is scratch: padding rows point there. A page whose tokens are known is found again by them: its name is the hash of
the page before it and of its own tokens, so one name stands for everything up to its end. Full pages are shared, they are
never written again. A partly filled page belongs to one sequence; who shares its first tokens gets a copy. Pages that nobody
uses stay known until their room is needed: the least recently used goes first, and in a sequence the last page.

The tensors themselves belong to the backend, which also copies pages (see `take_copies`).
"""

import hashlib
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

WORTH_COPYING = 4  # tokens: fewer are computed as quickly as a page is copied
_ROOT = b"latentrt"
_TOKEN = 4  # bytes; big-endian, so that bytes are in the order of tokens


class CacheFullError(RuntimeError):
    """No free page is left."""


@dataclass(frozen=True)
class Match:
    """What is known of a list of tokens: full pages and the names of all that came before each end, then the first `tail`
    tokens of page `source`."""

    pages: tuple[int, ...]
    names: tuple[bytes, ...]
    source: int = 0
    tail: int = 0


@dataclass
class _Held:
    """The pages of a sequence. names[i] stands for the tokens of the first i pages, as far as those are full and known."""

    names: list[bytes] = field(default_factory=lambda: [_ROOT])
    pages: list[int] = field(default_factory=list)


class LatentCache:
    """Bookkeeping of `num_pages` pages of `page_size` tokens; page 0 is never given out. Not for several threads at once."""

    def __init__(self, num_pages: int, page_size: int):
        if num_pages < 2:
            raise ValueError(f"a latent cache needs 2 pages or more (page 0 is scratch), got {num_pages}")
        self.num_pages, self.page_size = num_pages, page_size
        self.version = 0  # changes whenever a `match` may have another result
        self._tables: dict[tuple[int, ...], np.ndarray] = {}  # the last one, as long as no sequence's pages change
        self._free = list(range(num_pages - 1, 0, -1))
        self._held: dict[int, _Held] = {}
        self._users = [0] * num_pages  # sequences, and copies to be made
        self._known: dict[int, tuple[bytes, bytes]] = {}  # page -> name of what comes before it, its tokens
        self._after: dict[bytes, list[tuple[bytes, int]]] = {}  # the same the other way round, sorted
        self._unused: OrderedDict[int, None] = OrderedDict()  # known pages without users, the least recently used first
        self._copies: dict[int, int] = {}  # page -> the page that it is to be a copy of

    @property
    def free_tokens(self) -> int:
        """Tokens that fit into the pages that no sequence uses."""
        return self._available * self.page_size

    @property
    def known_tokens(self) -> int:
        """Tokens that pages without users hold for whoever begins with the same ones."""
        return sum(len(self._known[page][1]) for page in self._unused) // _TOKEN

    @property
    def capacity(self) -> int:
        """Tokens that fit in all."""
        return (self.num_pages - 1) * self.page_size

    def reserve(self, sequence: int, length: int) -> None:
        """Makes room for the first `length` tokens of a sequence. Raises CacheFullError, taking nothing, if it does not fit."""
        needed = self._missing(sequence, length)
        if needed > self._available:
            raise CacheFullError(
                f"sequence {sequence} needs {needed} more pages of {self.page_size} tokens, {self._available} are free"
            )
        pages = self._held.setdefault(sequence, _Held()).pages
        if needed > 0:
            self._tables.clear()
            pages.extend(self._take() for _ in range(needed))

    def fits(self, sequence: int, length: int) -> bool:
        """Whether `reserve` would succeed."""
        return self._missing(sequence, length) <= self._available

    def room(self, sequence: int) -> int:
        """Tokens that a sequence's pages hold."""
        held = self._held.get(sequence)
        return len(held.pages) * self.page_size if held else 0

    def match(self, tokens: Sequence[int], salt: str = "") -> Match:
        """What is known of all tokens but the last one, whose logits are wanted. `salt`: found by those only that give it."""
        wanted = _bytes(tokens[:-1])
        step = self.page_size * _TOKEN
        pages, names = [], [_root(salt)]
        for start in range(0, len(wanted), step):
            part = wanted[start : start + step]
            page, common = self._best(names[-1], part)
            if common < step:
                return Match(tuple(pages), tuple(names), page, common // _TOKEN)
            pages.append(page)
            names.append(_name(names[-1], part))
        return Match(tuple(pages), tuple(names))

    def attach(self, sequence: int, match: Match, length: int) -> int | None:
        """Gives a sequence without pages what is known of it, and room for `length` tokens.

        Returns the number of tokens that are cached by then; None, taking nothing, if it does not fit.
        """
        pages = -(-length // self.page_size)
        idle = sum(page in self._unused for page in match.pages)
        needed, copied = pages - len(match.pages), match.tail >= WORTH_COPYING and pages > len(match.pages)
        alone = copied and self._is_whole(match)
        pinned = copied and match.source in self._unused  # either it is taken over, or it has to stay until it is copied
        if needed + idle + (pinned and not alone) > self._available:
            if needed + idle > self._available:
                return None
            copied = False
        self._tables.clear()
        for page in match.pages:
            self._use(page)
        held = self._held[sequence] = _Held(list(match.names), list(match.pages))
        if copied:
            held.pages.append(self._take_over(match.source) if alone else self._copy(match.source))
        held.pages.extend(self._take() for _ in range(pages - len(held.pages)))
        return len(match.pages) * self.page_size + (match.tail if copied else 0)

    def learn(self, sequence: int, tokens: Sequence[int], cached: int) -> None:
        """The first `cached` tokens of a sequence are in its pages: full ones can be found from now on.

        A page whose tokens another page holds already is given back, and that one used instead.
        """
        held = self._held[sequence]
        while (end := len(held.names) * self.page_size) <= cached:
            place = len(held.names) - 1
            before, content = held.names[-1], _bytes(tokens[end - self.page_size : end])
            twin, common = self._best(before, content)
            if common == len(content):
                self._tables.clear()
                self._use(twin)
                self._drop(held.pages[place])
                held.pages[place] = twin
            else:
                self._remember(held.pages[place], before, content)
            held.names.append(_name(before, content))

    def release(self, sequence: int, tokens: Sequence[int] = (), cached: int = 0) -> None:
        """Gives a sequence's pages back. Its first `cached` tokens stay known until their room is needed."""
        held = self._held.get(sequence)
        if held is None:
            return
        if cached and not self._copies.keys() & set(held.pages):
            self.learn(sequence, tokens, cached)
            full = len(held.names) - 1
            tail = _bytes(tokens[full * self.page_size : cached])
            if tail and self._best(held.names[-1], tail)[1] < len(tail):
                self._remember(held.pages[full], held.names[-1], tail)
        self._give_back(sequence)

    def discard(self, sequence: int) -> None:
        """Gives a sequence's pages back, and forgets what is in them: nobody knows what was written."""
        for page in self._held[sequence].pages if sequence in self._held else ():
            self._forget(page)
        self._give_back(sequence)

    def take_copies(self) -> list[tuple[int, int]]:
        """Pages that have to be copied before the next step, as (from, to); they count as copied from now on."""
        copies = [(source, target) for target, source in self._copies.items()]
        self._copies.clear()
        for source, _ in copies:
            self._drop(source)
        return copies

    def block_table(self, sequences: list[int]) -> np.ndarray:
        """[B, max_pages] int32, not to be written; entries past a sequence's last page are 0."""
        key = tuple(sequences)
        if key not in self._tables:
            self._tables = {key: self._table(sequences)}
        return self._tables[key]

    def _table(self, sequences: list[int]) -> np.ndarray:
        rows = [self._held[s].pages if s in self._held else [] for s in sequences]
        table = np.zeros((len(rows), max([1, *map(len, rows)])), np.int32)
        for row, pages in zip(table, rows, strict=True):
            row[: len(pages)] = pages
        return table

    @property
    def _available(self) -> int:
        return len(self._free) + len(self._unused)

    def _missing(self, sequence: int, length: int) -> int:
        held = self._held.get(sequence)
        return -(-length // self.page_size) - (len(held.pages) if held else 0)

    def _best(self, before: bytes, content: bytes) -> tuple[int, int]:
        """The page after `before` that shares the most bytes of whole tokens with `content`, and their number.

        Of sorted texts, one beside the place of a text shares the most with it.
        """
        known = self._after.get(before, [])
        place = bisect_left(known, (content, 0))
        found = [(_common(known[n][0], content), known[n][1]) for n in (place, place - 1) if 0 <= n < len(known)]
        common, page = max(found, default=(0, 0), key=lambda pair: pair[0])
        return page, common

    def _is_whole(self, match: Match) -> bool:
        """Whether the tail is all that its page holds, and nobody uses it: then it need not be copied."""
        return match.source in self._unused and len(self._known[match.source][1]) == match.tail * _TOKEN

    def _take_over(self, page: int) -> int:
        self._use(page)
        self._forget(page)
        return page

    def _copy(self, source: int) -> int:
        self._use(source)  # so that it stays until it is copied
        target = self._take()
        self._copies[target] = source
        return target

    def _take(self) -> int:
        """A page for one sequence alone; something known is forgotten for it if need be."""
        if not self._free:
            page = next(iter(self._unused))
            self._forget(page)
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _use(self, page: int) -> None:
        self._users[page] += 1
        self._unused.pop(page, None)

    def _drop(self, page: int) -> None:
        self._users[page] -= 1
        if not self._users[page]:
            if page in self._known:
                self._unused[page] = None
            else:
                self._free.append(page)

    def _give_back(self, sequence: int) -> None:
        self._tables.clear()
        held = self._held.pop(sequence, _Held())
        for page in reversed(held.pages):  # so that the last one is the first to go
            source = self._copies.pop(page, None)
            if source is not None:
                self._drop(source)
            self._drop(page)

    def _remember(self, page: int, before: bytes, content: bytes) -> None:
        self.version += 1
        self._known[page] = before, content
        insort(self._after.setdefault(before, []), (content, page))

    def _forget(self, page: int) -> None:
        if page not in self._known:
            return
        self.version += 1
        before, content = self._known.pop(page)
        siblings = self._after[before]
        del siblings[bisect_left(siblings, (content, page))]
        if not siblings:
            del self._after[before]
        if page in self._unused:
            del self._unused[page]
            self._free.append(page)


def _root(salt: str) -> bytes:
    return _name(_ROOT, salt.encode(errors="surrogatepass")) if salt else _ROOT


def _name(before: bytes, content: bytes) -> bytes:
    """128 bits of a cryptographic hash: nobody finds two texts with the same one."""
    return hashlib.blake2b(before + content, digest_size=16).digest()


def _bytes(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, f">u{_TOKEN}").tobytes()


def _common(one: bytes, other: bytes) -> int:
    """Bytes of the whole tokens that both begin with."""
    size = min(len(one), len(other))
    if one[:size] == other[:size]:
        return size
    differ = np.frombuffer(one, np.uint8, size) != np.frombuffer(other, np.uint8, size)
    return int(differ.argmax()) // _TOKEN * _TOKEN
