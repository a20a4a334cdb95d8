"""mla_prefill of narrow heads, which ended in an illegal address on an H100: which sizes and which tiles do, a process each.

`python -m benchmarks.gpu.narrow '{"block_k": 32}' 6 64 32 16 32` runs one (changes of the GPU's tile; heads, kv_lora_rank,
qk_nope_head_dim, qk_rope_head_dim, v_head_dim) and prints one line. Under compute-sanitizer it names the instruction.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.gpu.run import Run, relative_error

EXAMPLE = (6, 64, 32, 16, 32)
SIZES = (
    EXAMPLE, (6, 512, 128, 64, 128), (6, 64, 128, 64, 128), (6, 512, 32, 64, 128), (6, 512, 128, 16, 128),
    (6, 512, 128, 64, 32), (16, 64, 32, 16, 32),
)  # fmt: skip
CHANGES = (
    dict(expand_stages=1), dict(tokens=64, expand_warps=4, block_n=64), dict(block_n=64), dict(stages=1),
    dict(rows=64, warps=4), dict(block_k=32), dict(block_k=32, expand_stages=1),
)  # fmt: skip
CASES = (([48, 2, 32, 65], [0, 0, 0, 0]), ([100, 3], [130, 60]))  # new tokens, cached tokens
SECONDS = 100


def check(run: Run) -> None:
    """Every outcome is told, none fails the run; the sanitizer's where it is there."""
    if run.device.type != "cuda":
        run.skip("narrow heads", "no GPU")
        return
    wanted = [({}, sizes, []) for sizes in SIZES] + [(change, EXAMPLE, []) for change in CHANGES]
    if sanitizer := shutil.which("compute-sanitizer"):
        wanted.append(({}, EXAMPLE, [sanitizer, "--tool", "memcheck"]))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (change, sizes, tool), outcome in zip(wanted, pool.map(lambda w: _child(*w), wanted), strict=True):
            words = ", ".join(f"{k} {v}" for k, v in change.items()) or "today's tile"
            run.measure(f"heads {sizes}, {words}{', sanitized' if tool else ''}", outcome=outcome)


def _child(change: dict, sizes: tuple[int, ...], tool: list[str]) -> str:
    command = [*tool, sys.executable, "-m", "benchmarks.gpu.narrow", json.dumps(change), *map(str, sizes)]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    try:
        child = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return f"does not end within {SECONDS} s"
    lines = child.stdout.strip().splitlines() or child.stderr.strip().splitlines() or ["no output"]
    faults = [line.removeprefix("=========").strip() for line in lines if line.startswith("=========")][1:6]
    return " / ".join(faults)[:400] if tool else lines[-1][:200]


def main(change: dict, sizes: tuple[int, ...]) -> str:
    """The largest relative error, or the error's first line."""
    from dataclasses import replace

    from benchmarks.gpu import prefill
    from benchmarks.gpu.attention import SCALE
    from latentrt.plugins.mla_prefill.kernel import mla_prefill_
    from latentrt.plugins.mla_prefill.reference import mla_prefill
    from latentrt.plugins.mla_prefill.tiles import TILES

    heads, *widths = sizes
    major, minor = torch.cuda.get_device_capability()
    TILES[10 * major + minor] = replace(TILES[10 * major + minor], **change)
    prefill.widths = lambda run: widths
    run, errors = Run(torch.device("cuda"), False), []
    try:
        for new, past in CASES:
            given = prefill.inputs(run, new, past, heads, torch.bfloat16)
            mine = [a.clone() if i == prefill.CACHE else a for i, a in enumerate(given)]
            attended = mla_prefill_(*mine, SCALE, "bfloat16")
            torch.cuda.synchronize()
            wide = [a.double() if i < 2 else a for i, a in enumerate(given)]
            expected, _ = mla_prefill(*wide, SCALE, "bfloat16")
            count = int(given[-1])
            errors.append(relative_error(attended[:count], expected[:count]))
    except RuntimeError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return f"right to {max(errors):.3g}" if max(errors) < prefill.LIMIT[torch.bfloat16] else f"wrong by {max(errors):.3g}"


if __name__ == "__main__":
    print(main(json.loads(sys.argv[1]), tuple(map(int, sys.argv[2:]))))
