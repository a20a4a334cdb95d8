"""Triton kernel that chooses tokens: greedy, temperature, top-k, top-p, min-p; a program a row.

It gives the tokens of runtime/engine/sampler.py, from the same uniform numbers, or says that a row is too close to call: where
a sum lies within its rounding error of a bound. Weights and sums are float64. What is kept is a threshold among the logits,
searched for by their bits, several at a time: by counts for top-k, by sums for top-p (in float32, and set right in float64
afterwards).
"""

import torch
import triton
import triton.language as tl

from latentrt.plugins.launch.torch import run
from latentrt.plugins.sampling.plan import Sampling, plan


@triton.jit
def _logits(at, column, VOCAB: tl.constexpr):
    """Whether columns exist, their logits (-inf where not) and keys: int64 of the same order, -0.0 as 0.0."""
    exists = column < VOCAB
    x = tl.load(at + column, mask=exists, other=float("-inf"))
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    return exists, x, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _weight(x, top, temperature):
    return tl.exp((x.to(tl.float64) - top) / temperature)


@triton.jit
def _search(at, low, high, top, temperature, wanted, BY_COUNT: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
            LANES: tl.constexpr, WAYS: tl.constexpr):  # fmt: skip
    """The largest key from `low` to below `high` such that the logits with it or a larger one count, or weigh, `wanted`.

    A pass over the logits tries WAYS keys; sums stay apart in LANES until its end.
    """
    floor = low
    way = tl.arange(0, WAYS).to(tl.int64) + 1
    while high - low > 1:
        keys = low + (high - low) * way // (WAYS + 1)  # rising; the last is above low
        found = tl.zeros([LANES, WAYS], tl.float32)
        for start in range(0, VOCAB, BLOCK):
            for part in tl.static_range(0, BLOCK, LANES):
                exists, x, key = _logits(at, start + part + tl.arange(0, LANES), VOCAB)
                exists = exists & (key >= floor)
                if BY_COUNT:
                    w = exists.to(tl.float32)
                else:
                    w = tl.where(exists, tl.exp((x - top.to(tl.float32)) / temperature.to(tl.float32)), 0.0)
                found += tl.where(key.to(tl.int32)[:, None] >= keys.to(tl.int32)[None, :], w[:, None], 0.0)
        enough = tl.sum(found.to(tl.float64), 0) >= wanted
        high = tl.min(tl.where(enough, high, keys), 0)
        low = tl.max(tl.where(enough, keys, low), 0)
    return low


@triton.jit
def _around(at, floor, key_at, top, temperature, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Of the logits from key `floor` on: the sum of those above `key_at`, their smallest key, the number of those with it,
    their weight, the largest key below, and how many weights are nearly theirs."""
    above = tl.full([1], 0.0, tl.float64)
    ties = tl.full([1], 0, tl.int32)
    near = tl.full([1], 0, tl.int32)
    weight = tl.full([1], 0.0, tl.float64)
    higher = tl.full([1], 1 << 40, tl.int64)
    lower = tl.full([1], -(1 << 40), tl.int64)
    for start in range(0, VOCAB, BLOCK):
        exists, x, key = _logits(at, start + tl.arange(0, BLOCK), VOCAB)
        exists = exists & (key >= floor)
        w = _weight(x, top, temperature)
        above += tl.sum(tl.where(exists & (key > key_at), w, 0.0), 0)
        ties += tl.sum((exists & (key == key_at)).to(tl.int32), 0)
        weight = tl.maximum(weight, tl.max(tl.where(exists & (key == key_at), w, 0.0), 0))
        higher = tl.minimum(higher, tl.min(tl.where(exists & (key > key_at), key, 1 << 40), 0))
        lower = tl.maximum(lower, tl.max(tl.where(exists & (key < key_at), key, -(1 << 40)), 0))
    for start in range(0, VOCAB, BLOCK):
        exists, x, key = _logits(at, start + tl.arange(0, BLOCK), VOCAB)
        w = _weight(x, top, temperature)
        close = (w - weight <= 1e-12 * weight) & (weight - w <= 1e-12 * weight)
        near += tl.sum((exists & (key >= floor) & close).to(tl.int32), 0)
    return tl.sum(above, 0), tl.sum(ties, 0), tl.sum(weight, 0), tl.sum(higher, 0), tl.sum(lower, 0), tl.sum(near, 0)


@triton.jit
def _total(at, floor, top, temperature, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.full([1], 0.0, tl.float64)
    for start in range(0, VOCAB, BLOCK):
        exists, x, key = _logits(at, start + tl.arange(0, BLOCK), VOCAB)
        total += tl.sum(tl.where(exists & (key >= floor), _weight(x, top, temperature), 0.0), 0)
    return tl.sum(total, 0)


@triton.jit
def _nucleus(at, floor, high, top, temperature, top_p, error, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
             LANES: tl.constexpr, WAYS: tl.constexpr):  # fmt: skip
    """Top-p among the logits from key `floor` on: a key, how many with just this key are kept, and whether that is sure."""
    total = _total(at, floor, top, temperature, VOCAB, BLOCK)
    target, slack = top_p * total, error * total
    threshold = _search(at, floor, high, top, temperature, target, False, VOCAB, BLOCK, LANES, WAYS)
    kept = tl.full([1], 0, tl.int32)
    state = tl.full([1], 1, tl.int32)
    turns = 0
    while turns < 8:
        above, ties, weight, higher, lower, near = _around(at, floor, threshold, top, temperature, VOCAB, BLOCK)
        turns += 1
        if (ties == 0) | (target > above + ties * weight + slack):
            turns = tl.where(lower < floor, 8, turns)
            threshold = tl.maximum(lower, floor)
        elif target < above - slack:
            turns = tl.where(higher >= high, 8, turns)
            threshold = tl.minimum(higher, high - 1)
        else:
            some = tl.ceil((target - above) / weight).to(tl.int32)
            some = tl.minimum(tl.maximum(some, 1), ties)
            sure = (above + (some - 1) * weight + slack < target) & (target < above + some * weight - slack) & (near == ties)
            kept = tl.full([1], 0, tl.int32) + some
            state = tl.where(sure, tl.full([1], 0, tl.int32), 1)
            turns = 8
    return threshold, tl.sum(kept, 0), tl.sum(state, 0)


@triton.jit
def _draw(at, threshold, kept, top, temperature, min_p, uniform, error, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The token that `uniform` falls on among logits above the threshold and the first `kept` on it; whether that is sure."""
    mass = tl.full([1], 0.0, tl.float64)
    close = tl.full([1], 0, tl.int32)
    ties = tl.full([1], 0, tl.int32)
    for start in range(0, VOCAB, BLOCK):
        column = start + tl.arange(0, BLOCK)
        exists, x, key = _logits(at, column, VOCAB)
        on = (exists & (key == threshold)).to(tl.int32)
        chosen = (exists & (key > threshold)) | ((on > 0) & (ties + tl.cumsum(on, 0) <= kept))
        w = _weight(x, top, temperature)
        mass += tl.sum(tl.where(chosen & (w >= min_p), w, 0.0), 0)
        close += tl.sum((chosen & (w - min_p <= 1e-12 * min_p) & (min_p - w <= 1e-12 * min_p)).to(tl.int32), 0)
        ties += tl.sum(on, 0)
    mass_all = tl.sum(mass, 0)
    unsure = (tl.sum(close, 0) > 0) & (min_p > 0) & (min_p < 1)
    target, slack = uniform * mass_all, error * mass_all
    token, sure = tl.full([1], -1, tl.int32), tl.full([1], 0, tl.int32)
    before, ties = tl.full([1], 0.0, tl.float64), tl.full([1], 0, tl.int32)
    for start in range(0, VOCAB, BLOCK):
        column = start + tl.arange(0, BLOCK)
        exists, x, key = _logits(at, column, VOCAB)
        on = (exists & (key == threshold)).to(tl.int32)
        chosen = (exists & (key > threshold)) | ((on > 0) & (ties + tl.cumsum(on, 0) <= kept))
        w = _weight(x, top, temperature)
        w = tl.where(chosen & (w >= min_p), w, 0.0)
        sums = before + tl.cumsum(w, 0)
        here = tl.min(tl.where((sums > target) & (w > 0), column, VOCAB), 0)
        if (tl.max(token, 0) < 0) & (here < VOCAB):
            upper = tl.sum(tl.where(column == here, sums, 0.0), 0)
            lower = upper - tl.sum(tl.where(column == here, w, 0.0), 0)
            token = tl.full([1], 0, tl.int32) + here
            first = lower <= slack  # nothing is before it
            sure = tl.full([1], 0, tl.int32) + (((lower + slack < target) | (first & (target >= 0) & (lower <= 0)))
                                                & (target < upper - slack)).to(tl.int32)  # fmt: skip
        before += tl.sum(w, 0)
        ties += tl.sum(on, 0)
    return tl.max(token, 0), (tl.max(sure, 0) > 0) & ~unsure


@triton.jit
def sample(logits, numbers, top_k, ids, states, largest, VOCAB: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
           WAYS: tl.constexpr):  # fmt: skip
    """logits [N, VOCAB]; numbers [N, 4]: temperature (0: the largest), top_p, min_p, uniform; top_k [N], 0: all.

    ids [N]; states [N]: 0, 1 where it is too close to call, 2 where logits are not finite; largest [N].
    """
    row = tl.program_id(0)
    at = logits + row.to(tl.int64) * VOCAB
    temperature = tl.load(numbers + row * 4)
    top_p = tl.load(numbers + row * 4 + 1)
    min_p = tl.load(numbers + row * 4 + 2)
    uniform = tl.load(numbers + row * 4 + 3)
    count = tl.load(top_k + row)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(0, VOCAB, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(at + column, mask=column < VOCAB, other=float("-inf"))
        bad |= (x != x).to(tl.int32)
        best = tl.where(x > best, x, best)
    most = tl.max(best, 0)
    broken = (tl.max(bad, 0) > 0) | (most == float("inf")) | (most == float("-inf"))
    token, state, high = VOCAB, 0, -(1 << 40)
    for start in range(0, VOCAB, BLOCK):
        column = start + tl.arange(0, BLOCK)
        exists, x, key = _logits(at, column, VOCAB)
        token = tl.minimum(token, tl.min(tl.where(exists & (x == most), column, VOCAB), 0))
        high = tl.maximum(high, tl.max(tl.where(exists, key, -(1 << 40)), 0))
    if (temperature > 0) & (broken == 0):
        top = most.to(tl.float64)
        error = 1e-15 * (VOCAB + 16)
        threshold, kept, sure = -(1 << 31) + tl.zeros([], tl.int64), VOCAB, 1
        if (count > 0) & (count < VOCAB):
            threshold = _search(at, threshold, high + 1, top, temperature, count.to(tl.float64), True, VOCAB, BLOCK, LANES,
                                WAYS)  # fmt: skip
        if top_p < 1:
            threshold, kept, unsure = _nucleus(at, threshold, high + 1, top, temperature, top_p, error, VOCAB, BLOCK, LANES,
                                               WAYS)  # fmt: skip
            sure = 1 - unsure
        token, drawn = _draw(at, threshold, kept, top, temperature, min_p, uniform, error, VOCAB, BLOCK)
        state = 1 - (sure & drawn.to(tl.int32))
    tl.store(ids + row, token)
    tl.store(states + row, tl.where(broken, 2, state))
    tl.store(largest + row, tl.where(tl.max(bad, 0) > 0, float("nan"), most))


def choose(logits: torch.Tensor, numbers: torch.Tensor, top_k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs the kernel on logits [N, vocab_size] float32, numbers [N, 4] float64, top_k [N] int32: ids, states, largest [N]."""
    tensors = dict(logits=logits.contiguous(), numbers=numbers, top_k=top_k)
    tensors |= {n: torch.empty(len(logits), dtype=torch.int32, device=logits.device) for n in ("ids", "states")}
    tensors["largest"] = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    run(plan(Sampling(logits.shape[1]), len(logits)), tensors)
    return tensors["ids"], tensors["states"], tensors["largest"]
