"""What the attention kernels share: a program finds its place in a ragged batch, whose lengths lie in device memory."""

import triton
import triton.language as tl


@triton.jit
def tiles_of(b, query_starts, num_tokens, sequences, cached_lengths, ROWS: tl.constexpr):
    """Tiles of ROWS that sequences b [N] have: of new rows; with cached_lengths of all tokens, none without new rows."""
    limit = tl.load(num_tokens)
    real = b < sequences
    start = tl.minimum(tl.load(query_starts + b, mask=real, other=0), limit)
    stop = tl.minimum(tl.load(query_starts + b + 1, mask=real, other=0), limit)
    count = stop - start
    if cached_lengths is not None:
        count = tl.where(count > 0, count + tl.load(cached_lengths + b, mask=real, other=0), 0)
    return (count + ROWS - 1) // ROWS


@triton.jit
def tiles_before(sequence, query_starts, num_tokens, cached_lengths, ROWS: tl.constexpr, SEARCH: tl.constexpr):
    """Tiles of ROWS of all sequences before `sequence`."""
    total = 0
    for base in range(0, sequence, SEARCH):
        b = base + tl.arange(0, SEARCH)
        total += tl.sum(tiles_of(b, query_starts, num_tokens, sequence, cached_lengths, ROWS), 0)
    return total


@triton.jit
def locate(query_starts, num_tokens, tile, sequences, ROWS: tl.constexpr, SEARCH: tl.constexpr, cached_lengths=None):
    """Sequence, its first tile, and the number of tiles of all sequences; sequence == sequences past the last tile."""
    sequence = 0
    first = 0
    total = 0
    for base in range(0, sequences, SEARCH):
        b = base + tl.arange(0, SEARCH)
        tiles = tiles_of(b, query_starts, num_tokens, sequences, cached_lengths, ROWS)  # [SEARCH]
        ends = total + tl.cumsum(tiles, 0)
        passed = (b < sequences) & (ends <= tile)
        sequence += tl.sum(passed.to(tl.int32), 0)
        first = tl.maximum(first, tl.max(tl.where(passed, ends, 0), 0))
        total += tl.sum(tiles, 0)
    return sequence, first, total


@triton.jit
def tile_rows(tile, query_starts, num_tokens, cached_lengths, tokens, sequences, ROWS: tl.constexpr, SEARCH: tl.constexpr):
    """Sequence of a tile of query rows; its first row; the end of the sequence's rows; position - row; tokens that it sees.

    Tiles past the last sequence's own the padding rows and see nothing.
    """
    sequence, first, total = locate(query_starts, num_tokens, tile, sequences, ROWS, SEARCH)
    limit = tl.load(num_tokens)
    padding = sequence == sequences
    start = tl.minimum(tl.load(query_starts + sequence), limit)  # of the padding rows if sequence == sequences
    row = start + (tile - tl.where(padding, total, first)) * ROWS
    stop = tl.where(padding, tokens, tl.minimum(tl.load(query_starts + tl.minimum(sequence + 1, sequences)), limit))
    shift = tl.load(cached_lengths + sequence, mask=sequence < sequences, other=0) - start
    length = tl.where(padding, 0, tl.minimum(row + ROWS, stop) + shift)
    return sequence, row, stop, shift, length


@triton.jit
def _work_of(b, query_starts, num_tokens, cached_lengths, sequences, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of ROWS new rows that sequences b [N] have, and blocks of BLOCK_N tokens that the last of them sees."""
    limit = tl.load(num_tokens)
    real = b < sequences
    start = tl.minimum(tl.load(query_starts + b, mask=real, other=0), limit)
    stop = tl.minimum(tl.load(query_starts + b + 1, mask=real, other=0), limit)
    length = stop - start + tl.load(cached_lengths + b, mask=real, other=0)
    return (stop - start + ROWS - 1) // ROWS, (length + BLOCK_N - 1) // BLOCK_N


@triton.jit
def work(query_starts, num_tokens, cached_lengths, sequences, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, SEARCH: tl.constexpr):
    """Blocks of tokens that all tiles of rows see, if every tile of a sequence sees as many as its last."""
    total = 0
    for base in range(0, sequences, SEARCH):
        b = base + tl.arange(0, SEARCH)
        tiles, blocks = _work_of(b, query_starts, num_tokens, cached_lengths, sequences, ROWS, BLOCK_N)
        total += tl.sum(tiles * blocks, 0)
    return total


@triton.jit
def locate_work(at, query_starts, num_tokens, cached_lengths, sequences, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
                SEARCH: tl.constexpr):  # fmt: skip
    """Of block `at` of `work`: its sequence, that one's first tile and first block, and the blocks of each of its tiles."""
    sequence = 0
    first = 0
    before = 0
    total = 0
    for base in range(0, sequences, SEARCH):
        b = base + tl.arange(0, SEARCH)
        tiles, blocks = _work_of(b, query_starts, num_tokens, cached_lengths, sequences, ROWS, BLOCK_N)
        ends = total + tl.cumsum(tiles * blocks, 0)
        passed = (b < sequences) & (ends <= at)
        sequence += tl.sum(passed.to(tl.int32), 0)
        first += tl.sum(tl.where(passed, tiles, 0), 0)
        before = tl.maximum(before, tl.max(tl.where(passed, ends, 0), 0))
        total += tl.sum(tiles * blocks, 0)
    length = tl.load(cached_lengths + sequence) - tl.minimum(tl.load(query_starts + sequence), tl.load(num_tokens))
    length += tl.minimum(tl.load(query_starts + sequence + 1), tl.load(num_tokens))
    return sequence, first, before, (length + BLOCK_N - 1) // BLOCK_N
