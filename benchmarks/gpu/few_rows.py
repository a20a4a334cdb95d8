"""Times our products of few rows beside a library's: those head by head, and the router's. For `fused_ops.py`'s bounds."""

from collections.abc import Callable

import torch

from benchmarks.gpu.run import Run, relative_error, timed

# heads, in, out of the absorbed products; experts, in of the router: V2-Lite's, V2's
HEADS = {"V2-Lite q_nope": (16, 128, 512), "V2-Lite o": (16, 512, 128), "V2 q_nope": (128, 128, 512)}
ROUTERS = {"V2-Lite router": (64, 2048), "V2 router": (160, 5120)}
LIMIT = 8e-3
ROUNDS = 5
MOST_BY_HEAD = 8  # rows: ours is compiled for every number of them


def measure(run: Run, rows: int) -> list[str]:
    """A line per product."""
    scale = 8 if run.dry else 1
    lines = [_heads(run, name, rows, *(s // scale for s in sizes)) for name, sizes in HEADS.items()]
    return lines + [_router(run, name, rows, *(s // scale for s in sizes)) for name, sizes in ROUTERS.items()]


def _heads(run: Run, name: str, rows: int, heads: int, inputs: int, outputs: int) -> str:
    from latentrt.runtime.backends.torch import head_kernels

    x, weight = run.randn(rows, heads, 2 * inputs)[..., :inputs], run.randn(heads, inputs, outputs)
    y = torch.empty(rows, heads, outputs, dtype=x.dtype, device=run.device)

    def library(w):
        return torch.bmm(x.transpose(0, 1), w, out=y.transpose(0, 1)).transpose(0, 1)

    calls = {"bmm": library}
    if rows <= MOST_BY_HEAD:
        calls = {"ours": lambda w: head_kernels.matmul_by_head(x, w)} | calls
    return _line(run, name, rows, weight, calls, torch.einsum("thi,hio->tho", x.double(), weight.double()))


def _router(run: Run, name: str, rows: int, experts: int, inputs: int) -> str:
    from latentrt.runtime.backends.torch import kernels

    x, weight = run.randn(rows, inputs), run.randn(experts, inputs)
    calls = {"ours": lambda w: kernels.wide_linear(x, w), "cast": lambda w: x.float() @ w.float().t()}
    if run.device.type == "cuda":
        calls["mm"] = lambda w: torch.mm(x, w.t(), out_dtype=torch.float32)
    return _line(run, name, rows, weight, calls, x.double() @ weight.double().t())


def _line(
    run: Run, name: str, rows: int, weight: torch.Tensor, calls: dict[str, Callable], expected: torch.Tensor
) -> str:
    weights = [weight.clone() for _ in range(run.sets(weight.nbytes))]
    wrong = [n for n, call in calls.items() if not relative_error(call(weight), expected) <= LIMIT]
    over = {n: (lambda call=call: [call(w) for w in weights][-1]) for n, call in calls.items()}
    seconds = timed(run, over, len(weights), ROUNDS)
    times = ", ".join(f"{n} {s * 1e6:.2f} us" for n, s in seconds.items())
    return f"{name}, {rows} rows: {times}" + "".join(f"; {n} is WRONG" for n in wrong)
