"""What the paper of DeepSeek-V2 (arXiv 2405.04434) claims of its deployment, beside what dimensions give.

The paper compares with DeepSeek 67B: 95 layers with grouped-query attention of 8 key and value heads.
"""

from dataclasses import dataclass

from latentrt.export.quantization import Fp8
from latentrt.planning.gpus import GPUS
from latentrt.planning.roofline import USABLE, Deployment, Step
from latentrt.planning.sizes import Model

GPU_COUNT = 8
CONTEXTS = (1024, 4096, 16384)
ASSUMPTIONS = (
    "8 x H800, 90 % of the memory for weights and cache; all sequences have the whole context, as many as fit",
    "V2: FP8 products, cache of about 6 bits (int6r), attention on every GPU for its own sequences, experts shared out",
    "67B: bfloat16 weights and cache, which tensor parallelism shares out evenly",
    "rooflines of decode steps: no communication, no waiting, no prompts in between, experts equally loaded",
)
UNREPRODUCED = (
    "50K generated and 100K prompt tokens/s on 8 x H800: measured by the paper; rooflines are upper bounds",
    "5.76 times the throughput: measured on the lengths of the paper's own service, which it does not give",
)


@dataclass(frozen=True)
class Gqa:
    """A dense model with grouped-query attention."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def parameters(self) -> int:
        """Embedding and head among them."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return self.layers * (attention + 3 * self.hidden * self.inner) + 2 * self.vocab * self.hidden

    @property
    def cache_bytes(self) -> int:
        """Of a token in all layers, in 16 bits."""
        return self.layers * 2 * self.kv_heads * self.head_dim * 2

    @property
    def pair_operations(self) -> int:
        """Operations of attention for one new token and one that it sees, in all layers."""
        return self.layers * self.heads * self.head_dim * 4

    def largest_batch(self, context: int) -> int:
        """Sequences of `context` tokens on GPU_COUNT H800."""
        free = GPU_COUNT * USABLE * GPUS["H800"].memory * 1e9 - 2 * self.parameters
        return int(free // (context * self.cache_bytes))

    def decode(self, batch: int, context: int) -> Step:
        gpu, read = GPUS["H800"], 2 * (self.parameters - self.vocab * self.hidden)
        bandwidth = GPU_COUNT * gpu.bandwidth * 1e9
        attention = context * self.pair_operations
        computing = batch * (2 * (self.parameters - self.vocab * self.hidden) + attention) / (GPU_COUNT * gpu.bf16 * 1e12)
        return Step(read / bandwidth, batch * context * self.cache_bytes / bandwidth, computing)


DEEPSEEK_67B = Gqa(95, 8192, 22016, 64, 8, 128, 102400)  # its config.json


def saved(cache_bytes: float) -> float:
    """The share of DeepSeek 67B's cache that a cache of so many bytes a token spares."""
    return 1 - cache_bytes / DEEPSEEK_67B.cache_bytes


def claims(model: Model) -> dict:
    """Each of the paper's figures beside what comes out here; `ratios` by context."""
    deployment = Deployment(model, GPUS["H800"], GPU_COUNT, Fp8(), "int6r")
    c = model.config
    six_bits = c.num_hidden_layers * (c.kv_lora_rank + c.qk_rope_head_dim) * 6 / 8
    rows = []
    for context in CONTEXTS:
        ours, theirs = deployment.largest_batch(context), DEEPSEEK_67B.largest_batch(context)
        if not ours:
            continue
        mine, other = deployment.decode(ours, context), DEEPSEEK_67B.decode(theirs, context)
        speeds = ours / mine.seconds, theirs / other.seconds
        rows.append({
            "context": context, "batch": ours, "tokens_per_second": speeds[0], "bound": mine.bound,
            "batch_67b": theirs, "tokens_per_second_67b": speeds[1], "bound_67b": other.bound, "ratio": speeds[0] / speeds[1],
        })  # fmt: skip
    prompt = deployment.prefill(CONTEXTS[1])
    return {
        "cache_saved": {"6 bits": saved(six_bits), **{name: saved(model.cache_bytes(name)) for name in model.taken_caches()}},
        "cache_saved_paper": 0.933,
        "ratios": rows,
        "ratio_paper": 5.76,
        "prompt_tokens_per_second": GPU_COUNT * CONTEXTS[1] / prompt.seconds,
        "prompt_tokens_per_second_paper": 100_000,
        "generated_tokens_per_second_paper": 50_000,
        "assumptions": list(ASSUMPTIONS),
        "unreproduced": list(UNREPRODUCED),
    }
