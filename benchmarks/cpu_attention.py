"""One attention op over each cache format on the CPU, decoding: alternating calls in one process, one thread.

    python -m benchmarks.cpu_attention [--kernels onnxruntime]

V2-Lite's shape: 16 heads, rank 512, rope 64. Absorbed: by own kernels with the products before and behind, as in a step of one
layer, or by the op's ONNX function, without these products.
"""

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import onnxruntime as ort
import torch
import typer

from latentrt.plugins import cache_formats
from latentrt.plugins.mla_attention.op import CONTRACT
from tests.plugins import cpu_nodes
from tests.plugins.test_ort_bodies import attention_inputs
from tests.plugins.test_ort_bodies import session as one_node

FORMATS = ("float32", "float16", "fp8", "int6", "int6r", "int4")
CASES = ((1, 512), (1, 4096), (8, 4096))  # sequences, tokens in the cache
SIZES = dict(page_size=64, heads=16, rank=512, nope=128, rope=64, v=128)


def own_kernels(cache_format: str, sequences: int, past: int) -> Callable[[], None]:
    rng = np.random.default_rng(0)
    case = cpu_nodes.mla(rng, [(past, 1)] * sequences, *SIZES.values(), cache_format=cache_format, form="absorbed")
    return bound(cpu_nodes.session(case.model, True), case.feeds)


def onnx_function(cache_format: str, sequences: int, past: int) -> Callable[[], None]:
    g, layout = torch.Generator().manual_seed(0), cache_formats.get(cache_format)
    sizes = SIZES["page_size"], SIZES["heads"], 0, 0, cache_format, SIZES["rank"], SIZES["rope"]
    tensors = attention_inputs([(0, 1)] * sequences, *sizes)  # a cache of this length is made at once below
    pages = past // SIZES["page_size"] + 1
    tokens = [torch.randn(sequences * pages * SIZES["page_size"], SIZES[name], generator=g) for name in ("rank", "rope")]
    tensors[4] = layout.encode(*tokens).unflatten(0, (-1, SIZES["page_size"]))
    tensors[5] = torch.arange(sequences * pages, dtype=torch.int32).view(sequences, pages)
    tensors[6] = torch.full((sequences,), past, dtype=torch.int32)
    session = one_node(CONTRACT, tensors, {"softmax_scale": 0.1, "cache_format": cache_format})
    return bound(session, {s.name: t.numpy() for s, t in zip(CONTRACT.inputs, tensors, strict=True)})


KERNELS = {"native": own_kernels, "onnxruntime": onnx_function}


def bound(session: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> Callable[[], None]:
    """The op with its cache bound in place."""
    binding = session.io_binding()
    held = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x)) for name, x in feeds.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("attended")
    binding.bind_ortvalue_output("cache_out", held["cache"])
    return lambda held=held: session.run_with_iobinding(binding)


def main(
    rounds: Annotated[int, typer.Option(help="Calls of each format.")] = 60,
    kernels: Annotated[str, typer.Option(help=f"{' or '.join(KERNELS)}.")] = "native",
) -> None:
    """Prints medians in microseconds as Markdown."""
    print(f"| sequences x tokens, us | {' | '.join(FORMATS)} |\n{'|---' * (len(FORMATS) + 1)}|")
    for sequences, past in CASES:
        calls = {name: KERNELS[kernels](name, sequences, past) for name in FORMATS}
        times: dict[str, list[float]] = {name: [] for name in FORMATS}
        for turn in range(rounds // sequences + 4):
            for name, run in calls.items():
                began = time.perf_counter()
                run()
                if turn:
                    times[name].append(1e6 * (time.perf_counter() - began))
        medians = " | ".join(f"{statistics.median(times[name]):,.0f}" for name in FORMATS)
        print(f"| {sequences} x {past:,} | {medians} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
