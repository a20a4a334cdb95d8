"""Addresses beyond 2^31 and 2^33 elements: DeepSeek-V2's real tensors, in memory that is reserved and hardly exists.

A kernel must give bit for bit what it gives where the same content lies at the beginning of a small tensor.
"""

import mmap
from math import prod

import pytest
import torch

from latentrt.plugins.architecture import Gpu
from latentrt.plugins.mla_attention.kernel import mla_attention_
from latentrt.plugins.mla_prefill.kernel import mla_prefill_
from latentrt.plugins.moe_experts.kernel import moe_experts

pytestmark = pytest.mark.slow

NORESERVE = 0x4000  # MAP_NORESERVE of Linux
PAGE, RANK, ROPE, HEADS = 64, 512, 64, 4
CACHED, NEW = 70, 2
TARGET = Gpu.of(90)


def virtual(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory where they are written."""
    memory = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_a_cache_of_more_than_2_to_the_33_elements(form):
    width, pages = RANK + ROPE, 2**33 // (PAGE * (RANK + ROPE)) + 9
    content, given = randn(2, PAGE, width), [randn(NEW, HEADS, ROPE), randn(NEW, RANK), randn(NEW, ROPE)]
    ints = [torch.tensor(x, dtype=torch.int32) for x in ([CACHED], [0, NEW], [NEW])]
    query = randn(NEW, HEADS, RANK if form == "absorbed" else 128)
    weights = [] if form == "absorbed" else [randn(HEADS, 128, RANK) / 16, randn(HEADS, RANK, 128) / 16]
    function, found = {"absorbed": mla_attention_, "expanded": mla_prefill_}[form], []
    for cache, places in ((torch.zeros(3, PAGE, width).bfloat16(), [1, 2]),
                          (virtual(pages, PAGE, width, dtype=torch.bfloat16), [pages - 1, pages - 3])):  # fmt: skip
        cache[places[0]], cache[places[1]] = content
        table = torch.tensor([places], dtype=torch.int32)
        attended = function(query, *given, *weights, cache, table, *ints, 0.1, "bfloat16", TARGET)
        found.append((attended, cache[places[0]].clone(), cache[places[1]].clone()))
    assert all(torch.equal(small, large) for small, large in zip(*found, strict=True))
    assert not torch.equal(found[0][2], content[1]), "the new tokens were appended"


@pytest.mark.parametrize("int4", [False, pytest.param(True, marks=pytest.mark.deep)])
def test_experts_of_more_than_2_to_the_30_bytes(int4):
    """160 experts of V2 in FP8, 2^31 elements and more, or in int4: the last two."""
    experts, hidden, inner, top_k = 160, 5120, 1536, 2
    packed, blocks = (2, (hidden // 128, inner // 128)) if int4 else (1, None)
    shapes, outputs = ((top_k, 2 * inner, hidden // packed), (top_k, hidden, inner // packed)), (2 * inner, hidden)
    octets = [torch.randint(-128, 128, shape, dtype=torch.int8) for shape in shapes]
    parts = octets if int4 else [(part / 32).to(torch.float8_e4m3fn) for part in octets]
    scales = [torch.rand(top_k, outputs[k], *([blocks[k]] if int4 else [])) / 100 for k in range(2)]
    x, share, found = randn(1, hidden), torch.rand(1, top_k), []
    for count in (top_k, experts):
        first = count - top_k
        weights = [virtual(count, *part.shape[1:], dtype=part.dtype) for part in parts]
        channel = [virtual(count, *scale.shape[1:], dtype=scale.dtype) for scale in scales]
        for whole, part in zip([*weights, *channel], [*parts, *scales], strict=True):
            whole[first:] = part
        ids = (torch.arange(top_k) + first)[None].int()
        found.append(moe_experts(x, ids, share, *weights, *channel, 0, "concatenated", target=TARGET, packed=packed))
    assert torch.equal(*found) and found[0].abs().max() > 0
