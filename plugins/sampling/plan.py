"""The launch that chooses a token for every row of logits."""

from dataclasses import dataclass
from functools import lru_cache

from latentrt.plugins.launch.plan import KernelSpec, Plan, bind

BLOCK, WARPS = 4096, 16  # logits that a program holds at a time
LANES, WAYS = 512, 8  # sums that a search for a threshold keeps apart, and thresholds that it tries in a pass
TENSORS = ("logits", "numbers", "top_k", "ids", "states", "largest")


@dataclass(frozen=True)
class Sampling:
    """The static part."""

    vocab_size: int


@lru_cache(maxsize=1024)
def plan(config: Sampling, rows: int) -> Plan:
    """The launch for logits [rows, vocab_size]: a program a row."""
    (kernel,) = kernels(config)
    return Plan((bind(kernel, (rows,), **{n: n for n in TENSORS}),) if rows else ())


def kernels(config: Sampling) -> tuple[KernelSpec, ...]:
    """The one kernel of `config`, for any GPU."""
    arguments = (("logits", "*fp32"), ("numbers", "*fp64"), ("top_k", "*i32"), ("ids", "*i32"), ("states", "*i32"),
                 ("largest", "*fp32"))  # fmt: skip
    constexprs = (("VOCAB", config.vocab_size), ("BLOCK", BLOCK), ("LANES", LANES), ("WAYS", WAYS))
    return (KernelSpec("sampling", "sample", arguments, constexprs, WARPS, 1, "(rows,)"),)
