"""Which replica knows a prompt's beginning: requests that begin alike go where their prefix is cached.

A prompt is cut into blocks of bytes, and a block is named by all bytes up to its end, as pages are in runtime/engine/pages.py.
Nothing is asked of the replicas: what was sent to one is taken to be cached there, for as long as the table remembers.
"""

import hashlib
import json
from collections import Counter, OrderedDict
from collections.abc import Collection, Hashable, Sequence

BLOCK = 256  # bytes: some 64 tokens, a page of the latent cache
REMEMBERED = 1 << 16  # blocks
SLACK = 8  # requests that a replica may have more than the least busy one, and still get those that begin alike


def blocks(body: bytes) -> list[bytes]:
    """Names of a request's whole blocks, in order; none where the body has no prompt that could be shared."""
    try:
        asked = json.loads(body)
    except ValueError:
        return []
    if not isinstance(asked, dict):
        return []
    responses = [asked.get("instructions"), asked["input"]] if asked.get("input") else None
    prompt = asked.get("messages", asked.get("prompt", responses))
    content = json.dumps(prompt, ensure_ascii=False).encode(errors="surrogatepass") if prompt else b""
    names, name = [], hashlib.blake2b(json.dumps(asked.get("tools")).encode(), digest_size=16).digest()
    for start in range(0, len(content) - BLOCK + 1, BLOCK):
        name = hashlib.blake2b(name + content[start : start + BLOCK], digest_size=16).digest()
        names.append(name)
    return names


class Affinity:
    """Remembers which replica was sent which blocks, and how many requests each has."""

    def __init__(self, remembered: int = REMEMBERED, slack: int = SLACK):
        self._remembered, self._slack = remembered, slack
        self._replicas: OrderedDict[bytes, Hashable] = OrderedDict()  # the last is the last used
        self._running: Counter[Hashable] = Counter()

    def best(self, names: Sequence[bytes], candidates: Collection[Hashable]) -> Hashable | None:
        """The candidate that knows most of the blocks; None if none does, or if that one is far busier than others."""
        for name in reversed(names):
            replica = self._replicas.get(name)
            if replica in candidates:
                least = min(self._running[c] for c in candidates)
                return replica if self._running[replica] <= least + self._slack else None
        return None

    def sent(self, names: Sequence[bytes], replica: Hashable) -> None:
        """A request went to a replica."""
        self._running[replica] += 1
        for name in names:
            self._replicas[name] = replica
            self._replicas.move_to_end(name)
        while len(self._replicas) > self._remembered:
            self._replicas.popitem(last=False)

    def ended(self, replica: Hashable) -> None:
        """A request to a replica has ended."""
        self._running[replica] = max(0, self._running[replica] - 1)

    def died(self, replica: Hashable) -> None:
        """Nothing is cached there any more."""
        self._running.pop(replica, None)
        for name in [name for name, owner in self._replicas.items() if owner == replica]:
            del self._replicas[name]
