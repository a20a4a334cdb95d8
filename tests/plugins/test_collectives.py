"""The collective ops, run by real processes over gloo, and their shapes."""

import ctypes
import multiprocessing
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from latentrt.plugins import ops
from latentrt.plugins.architecture import Gpu
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


class FakeNccl:
    """nccl4py's raw calls, noted."""

    DataType = SimpleNamespace(Bfloat16=9, Int32=2, Float32=7)
    RedOp = SimpleNamespace(Sum=0)
    UniqueId = SimpleNamespace(from_ptr=lambda address: ctypes.string_at(address, 128))

    def __init__(self):
        self.calls = []

    def comm_init_rank(self, ranks, unique, rank):
        self.calls.append(("init", ranks, unique, rank))
        return 0xC0

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *arguments))


def test_a_plugin_is_one_call_of_nccl_on_the_steps_stream():
    from latentrt.plugins.launch.cuda import CudaLauncher, LaunchError
    from latentrt.plugins.launch.nccl import Communicator

    fake, target = FakeNccl(), Gpu.of(89)
    launcher = CudaLauncher(target, {}, driver=object())
    gather, scatter = (ops.plugins()[name] for name in ("AllGather", "ReduceScatter"))
    four = {"num_ranks": 4}
    plans = [gather.plan(gather.configure(four, {}, {"x": "bfloat16"}), {"T": 6, "width": 8}, target),
             scatter.plan(scatter.configure(four, {}, {"x": "float32"}), {"rows": 24, "width": 8}, target)]  # fmt: skip
    with pytest.raises(LaunchError, match="all_gather joins ranks, and this process has joined none"):
        launcher.ready(plans[0], ["x", "y"])
    launcher.communicator = Communicator(bytes(range(128)), 3, 4, fake)
    for plan in plans:
        launcher.ready(plan, ["x", "y"])([0x1000, 0x2000], 0, 0x5EED)
    launcher.communicator.close()
    assert fake.calls == [
        ("init", 4, bytes(range(128)), 3),
        ("all_gather", 0x1000, 0x2000, 48, 9, 0xC0, 0x5EED),
        ("reduce_scatter", 0x1000, 0x2000, 48, 7, 0, 0xC0, 0x5EED),
        ("comm_abort", 0xC0),
    ]
    assert all(not op.kernels(None, target) and op.workspace(None, {}, target) == 0 for op in (gather, scatter))


def test_the_real_bindings_have_what_is_called():
    """nccl4py, where it is installed; its library needs no GPU for that."""
    real = pytest.importorskip("nccl.bindings.nccl", reason="pip install nccl4py")
    for name in ("get_unique_id", "comm_init_rank", "all_gather", "reduce_scatter", "comm_abort"):
        assert callable(getattr(real, name))
    assert {"Float32", "Float16", "Bfloat16", "Int32"} <= set(real.DataType.__members__) and hasattr(real.UniqueId, "from_ptr")
