"""The collective ops, run by real processes over gloo, and their shapes."""

import multiprocessing
import socket

import pytest
import torch
import torch.distributed as dist

from latentrt.plugins import ops
from latentrt.plugins.contract import ContractError
from latentrt.plugins.ranks import RankError

ROWS, WIDTH = 3, 4
DTYPES = [torch.float32, torch.bfloat16]


def rows_of(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Whole numbers, so that sums are exact in every type and order."""
    return (torch.arange(count * WIDTH).view(count, WIDTH) % 13 + 5 * rank).to(dtype)


def run_rank(rank: int, ranks: int, port: int, answers) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    ops.contracts()
    found = {}
    for dtype in (*DTYPES, torch.int32):
        found["gather", dtype] = torch.ops.latentrt.all_gather(rows_of(rank, ROWS, dtype), ranks)
    for dtype in DTYPES:
        found["scatter", dtype] = torch.ops.latentrt.reduce_scatter(rows_of(rank, ROWS * ranks, dtype), ranks)
    try:
        torch.ops.latentrt.all_gather(rows_of(rank, ROWS, torch.float32), ranks + 1)
    except RankError as error:
        found["other"] = str(error)
    answers.put((rank, {k: v if isinstance(v, str) else v.float().numpy() for k, v in found.items()}))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 3])
def test_they_join_processes(ranks):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=run_rank, args=(rank, ranks, port, answers)) for rank in range(ranks)]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for rank in range(ranks):
        for dtype in (*DTYPES, torch.int32):
            whole = torch.cat([rows_of(r, ROWS, dtype) for r in range(ranks)])
            torch.testing.assert_close(torch.from_numpy(found[rank]["gather", dtype]), whole.float(), rtol=0, atol=0)
        for dtype in DTYPES:
            total = sum(rows_of(r, ROWS * ranks, dtype).float() for r in range(ranks))[rank * ROWS : (rank + 1) * ROWS]
            torch.testing.assert_close(torch.from_numpy(found[rank]["scatter", dtype]), total, rtol=0, atol=0)
        assert f"{ranks + 1} ranks" in found[rank]["other"] and f"one of {ranks}" in found[rank]["other"]


def test_shapes_follow_from_the_number_of_ranks():
    ops.contracts()
    x = torch.zeros(6, 5, device="meta")
    assert torch.ops.latentrt.all_gather(x, 4).shape == (24, 5)
    assert torch.ops.latentrt.reduce_scatter(x, 3).shape == (2, 5)


def test_alone_they_say_what_is_missing():
    ops.contracts()
    for op in ("all_gather", "reduce_scatter"):
        with pytest.raises(RankError, match=f"{op} joins 2 ranks, this process is one of 1"):
            getattr(torch.ops.latentrt, op)(torch.zeros(4, 3), 2)


def test_types_are_checked():
    ops.contracts()
    with pytest.raises(ContractError, match="all_gather: x has dtype"):
        torch.ops.latentrt.all_gather(torch.zeros(4, 3, dtype=torch.int64), 2)
