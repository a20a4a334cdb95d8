"""What a model's dimensions tell: parameters, bytes of weights and of cached tokens, operations of a token."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import prod

from latentrt.errors import UserError
from latentrt.export.models import registry
from latentrt.export.models.base import Config, Weight
from latentrt.export.quantization import WeightFormat
from latentrt.plugins import cache_formats
from latentrt.plugins.architecture import Gpu
from latentrt.plugins.moe_experts.plan import Experts, workspace_bytes

FLOAT8 = "float8_e4m3fn"
ROUTED = ("gate_up", "down")  # roles of the weights that all routed experts of a layer share


@dataclass(frozen=True)
class Parts:
    """A sum over a model's weights: of the routed experts, of the embedding, and of all others."""

    routed: float
    embedding: float
    rest: float

    @property
    def total(self) -> float:
        return self.routed + self.embedding + self.rest


@dataclass(frozen=True)
class Model:
    """A model that plans are made for."""

    config: Config
    weights: tuple[Weight, ...]

    @classmethod
    def of(cls, config: Config) -> "Model":
        return cls(config, tuple(registry.of(config).weights(config)))

    @property
    def parameters(self) -> Parts:
        """How many there are; kv_b_proj counts once, as w_uk and w_uv."""
        return _parts((weight, prod(weight.shape)) for weight in self.weights)

    @property
    def active(self) -> float:
        """Parameters that one token meets, embedding and head among them."""
        return self.parameters.total - self.parameters.routed * (1 - self.chosen_share)

    @property
    def chosen_share(self) -> float:
        """The share of a layer's routed experts that one token chooses."""
        return self.config.num_experts_per_tok / self.config.n_routed_experts

    def touched_share(self, tokens: float) -> float:
        """The share of the routed experts that `tokens` tokens choose together, if all are equally likely: 1 - (1 - k/E)^n."""
        return 1 - (1 - self.chosen_share) ** tokens

    def weight_bytes(self, weight_format: WeightFormat) -> Parts:
        """Bytes as the format stores them."""
        return _parts((w, _stored_bytes(w, weight_format)) for w in self.weights)

    def head_bytes(self, weight_format: WeightFormat) -> int:
        """Those of the output head, which are among the rest."""
        return sum(_stored_bytes(w, weight_format) for w in self.weights if w.role == "head")

    def operations(self, weight_format: WeightFormat) -> dict[str, tuple[float, float]]:
        """Operations (2 a product and sum) of one token with the weights of its routed experts, of the head, and all others.

        Of each those with quantized weights, and those with plain ones. In bfloat16 nothing is quantized; weights of 4 bits
        count as plain, since kernels multiply them as bfloat16.
        """
        found = {kind: [0.0, 0.0] for kind in ("routed", "head", "rest", "embedding")}
        for weight in self.weights:
            kind = "routed" if weight.role in ROUTED else weight.role if weight.role in found else "rest"
            share = self.chosen_share if kind == "routed" else 1.0
            eight = weight_format.is_quantized(weight) and weight_format.bits_of(weight) == 8  # 4-bit weights meet bf16 rows
            found[kind][not eight] += 2 * share * prod(weight.shape)
        return {kind: tuple(counts) for kind, counts in found.items() if kind != "embedding"}

    def linear_operations(self, weight_format: WeightFormat, head: float = 1.0) -> tuple[float, float]:
        """The sums of `operations`. head: the share of tokens that get logits."""
        found, shares = self.operations(weight_format), {"head": head}
        return tuple(sum(shares.get(kind, 1.0) * counts[k] for kind, counts in found.items()) for k in (0, 1))

    def workspace_bytes(self, weight_format: WeightFormat, rows: int) -> int:
        """Bytes that the op moe_experts needs beside weights and output for so many rows, those of other ranks among them."""
        c, routed = self.config, next((weight for weight in self.weights if weight.role in ROUTED), None)
        if routed is None:
            return 0
        hidden, inner = (-(-n // 16) * 16 for n in (c.hidden_size, c.moe_intermediate_size))  # as kernels take them
        kind = {"weights": "bfloat16"}
        if weight_format.is_quantized(routed) and weight_format.bits_of(routed) == 4:
            block = weight_format.blocks["gate_up"]
            kind = {"weights": "int8", "packed": 2, "gate_up_blocks": hidden // block, "down_blocks": inner // block}
        elif weight_format.is_quantized(routed) and weight_format.quantized == FLOAT8:
            kind = {"weights": FLOAT8}
        experts = Experts(c.n_routed_experts, hidden, inner, c.num_experts_per_tok, "bfloat16", first_expert=0,
                          gate_up_layout="concatenated", **kind)  # fmt: skip
        return workspace_bytes(experts, rows, Gpu.of(90))

    @property
    def rank_counts(self) -> list[int]:
        """How many GPUs can share the experts."""
        family = registry.of(self.config)
        return [n for n in range(1, self.config.n_routed_experts + 1) if n == 1 or not family.rank_refusal(self.config, n)]

    @property
    def expert_layers(self) -> int:
        """Layers with routed experts."""
        return len({weight.module for weight in self.weights if weight.role in ROUTED})

    @property
    def absorbed_operations(self) -> int:
        """Operations of attention for one new token and one that it sees, over latents: scores and sums of all layers."""
        c = self.config
        return c.num_hidden_layers * c.num_attention_heads * 2 * (2 * c.kv_lora_rank + c.qk_rope_head_dim)

    @property
    def expanded_operations(self) -> int:
        """The same over keys and values of the heads' own width."""
        c = self.config
        return c.num_hidden_layers * c.num_attention_heads * 2 * (c.qk_head_dim + c.v_head_dim)

    @property
    def expansion_operations(self) -> int:
        """Operations that make one cached token's keys and values."""
        c = self.config
        return c.num_hidden_layers * c.num_attention_heads * 2 * c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)

    def cache_bytes(self, cache_format: str) -> int:
        """Bytes of a token in all layers. UserError if the format does not take the model's sizes."""
        sizes = (self.config.kv_lora_rank, self.config.qk_rope_head_dim)
        layout = cache_formats.get(cache_format)
        if (refusal := layout.refusal(*sizes)) is not None:
            raise UserError(f"cache format {cache_format!r} at kv_lora_rank {sizes[0]}, qk_rope_head_dim {sizes[1]}: {refusal}")
        return layout.bytes_per_token(*sizes) * self.config.num_hidden_layers

    def cache_bits(self, cache_format: str) -> float:
        """Bits of an element of the cache, scales included."""
        elements = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        return 8 * self.cache_bytes(cache_format) / (elements * self.config.num_hidden_layers)

    def taken_caches(self) -> list[str]:
        """The cache formats that take the model's sizes."""
        sizes = (self.config.kv_lora_rank, self.config.qk_rope_head_dim)
        return [name for name in cache_formats.NAMES if cache_formats.get(name).refusal(*sizes) is None]


def formats(model: Model) -> dict[str, WeightFormat]:
    """`formats_of` the model's weights, the largest first."""
    found = formats_of(model.weights)
    return dict(sorted(found.items(), key=lambda item: -model.weight_bytes(item[1]).total))


def formats_of(weights: Sequence[Weight]) -> dict[str, WeightFormat]:
    """Weight formats by precision, as builds choose them for these weights, but for those that take no such experts."""
    from latentrt.export.errors import BuildError
    from latentrt.export.lowering.onnxruntime.choices import CpuOptions
    from latentrt.export.lowering.onnxruntime.lowering import weight_format
    from latentrt.export.lowering.tensorrt.lowering import weight_format as gpu_weight_format

    makers = {p: partial(gpu_weight_format, precision=p) for p in ("bf16", "fp8", "fp8-int4", "bf16-int4")}
    makers |= {p: partial(weight_format, options=CpuOptions(p)) for p in ("fp32", "int8", "int4")}
    found = {}
    for precision, make in makers.items():
        with suppress(BuildError):
            found[precision] = make(list(weights))
    return found


def _stored_bytes(weight: Weight, weight_format: WeightFormat) -> int:
    return sum(prod(s.shape) * s.dtype.itemsize for s in weight_format.stored(weight))


def _parts(counted: Iterable[tuple[Weight, int]]) -> Parts:
    sums = dict.fromkeys(("routed", "embedding", "rest"), 0)
    for weight, count in counted:
        sums["routed" if weight.role in ROUTED else "embedding" if weight.role == "embedding" else "rest"] += count
    return Parts(**sums)
