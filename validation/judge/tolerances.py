"""How far each precision may be off, and why. The numbers belong to the number format, not to a test.

"exact" compares with transformers on the very weights that the engine has (decoded ones where they are rounded), so it
holds the computation to account; "fidelity" compares with the original weights, so it holds the precision to account.

Rounding to m bits of mantissa (bf16 7, e4m3 3) is off by 2^-(m+1) of a value at most and by 0.4 of that on average (root
mean square over mantissas): bf16 0.4 % and 0.16 %, e4m3 6 % and 2.5 %. A product's relative error is that of its inputs,
since signs are random; errors of products in a row add as squares. Single logits of these formats mean little: one flip of
the routing moves some by units, and two correct executions of one graph differ by as much as each does from float32. What
is judged is the distribution, and every layer by itself. Measured values are those of examples/tiny-deepseek-v2.
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Tolerance:
    """`sense` says on which side of `limit` a value passes. None as limit: measured and reported, not judged."""

    limit: float | None
    reason: str
    sense: Literal["<=", ">="] = "<="

    def passes(self, value: float) -> bool:
        """NaN never passes."""
        if self.limit is None:
            return True
        return value <= self.limit if self.sense == "<=" else value >= self.limit


@dataclass(frozen=True)
class Tolerances:
    """All limits of one precision. `name` is shown in the report."""

    name: str
    plain_weights: Tolerance  # weights that are not quantized: largest |stored - checkpoint| over the row's largest element
    weights: Tolerance  # the same of quantized ones, decoded
    model_logits: Tolerance  # torch model against transformers, largest absolute error
    graph_logits: Tolerance  # exported fp32 graph against transformers
    float_layer: Tolerance  # relative error of one layer of torch model and graph, input given
    exact_logits: Tolerance  # engine against transformers on the engine's weights, largest absolute error
    exact_kl: Tolerance  # the same, mean KL in nats
    layer: Tolerance  # relative error of one engine layer, input and routing given
    token: Tolerance  # the same of the worst token, of what attention and MLP add: an expert that is wrong meets few tokens
    routing_weights: Tolerance  # router's weights against the formula on its own logits, largest absolute error, all stages
    routed_logits: Tolerance  # the same as exact_logits with the reference's routing forced
    flips: Tolerance  # routing differences that no near tie explains, all stages
    greedy: Tolerance  # greedy tokens that differ without a near tie
    kl_mean: Tolerance  # engine against transformers on the original weights
    top1: Tolerance
    perplexity: Tolerance  # |engine perplexity / reference perplexity - 1|


_FLOAT_LAYER = Tolerance(
    2e-5, "float32 sums in another order: measured 1e-6 (6e-8 times the root of a sum's length, over a layer's five products)"
)
_UNEXPLAINED = Tolerance(0, "the gate margin of a flip must be one that the router's input error can bridge")

FP32 = Tolerances(
    name="fp32",
    plain_weights=Tolerance(0.0, "float32 holds every bf16, f16 and f32 value exactly"),
    weights=Tolerance(0.0, "nothing is quantized"),
    model_logits=Tolerance(1e-4, "same arithmetic as transformers, other order of sums (absorbed kv_b_proj); measured 2e-5"),
    graph_logits=Tolerance(1e-3, "ONNX Runtime's order of sums; measured 2e-5; the limit is the project's promise"),
    float_layer=_FLOAT_LAYER,
    exact_logits=Tolerance(1e-3, "the project's promise for fp32; measured 2e-5 to 5e-5 over 5 layers, growing with depth"),
    exact_kl=Tolerance(1e-6, "KL goes with the square of the logit error: 1e-3 squared"),
    layer=_FLOAT_LAYER,
    token=Tolerance(1e-4, "five times a layer's: one token's sums do not average out; measured 2.5e-6"),
    routing_weights=Tolerance(1e-4, "routing is float32 in every precision: softmax is off by 1e-6 of a weight"),
    routed_logits=Tolerance(1e-3, "as exact logits; with the routing given no near tie can excuse more"),
    flips=_UNEXPLAINED,
    greedy=Tolerance(0, "greedy tokens may part only where the two best logits are within twice the logit limit"),
    kl_mean=Tolerance(1e-5, "no precision is given up; what remains is rounding and flips on near ties"),
    top1=Tolerance(0.999, "one near tie of the two best tokens in a thousand may fall either way", ">="),
    perplexity=Tolerance(1e-4, "rounding averages out over the text"),
)
INT8_EXACT = replace(
    FP32,
    name="int8, exact",
    weights=Tolerance(
        1.01 / 254, "symmetric 8 bits: off by half a step at most, a step is a block's largest element / 127; 1 % for rounding"
    ),
    exact_logits=Tolerance(1e-3, "decoded weights and float32 sums: only the order of sums differs from transformers"),
    kl_mean=Tolerance(0.01, "weights cost 3e-4 nats on the example, int8 activations 6e-4 more; the project's promise"),
    top1=Tolerance(0.97, "the project's promise; near ties of the best two tokens fall the other way", ">="),
    perplexity=Tolerance(0.02, "mean KL of 0.01 nats bounds the expected change of log-perplexity to about 1 %; twice that"),
)
INT8_FAST = replace(
    INT8_EXACT,
    name="int8, fast",
    exact_logits=Tolerance(None, "products round activations to int8: single logits move; the distribution is judged"),
    exact_kl=Tolerance(0.01, "what int8 activations add on top of int8 weights must stay within the promise for both"),
    layer=Tolerance(
        0.05, "int8 activations: off by 1/254 of a block's largest element, some 0.7 % a product, measured 1.5 % a layer"
    ),
    token=Tolerance(0.15, "three times a layer's: a token with one large activation loses small ones; measured 2.5 %"),
    routed_logits=Tolerance(None, "as exact logits"),
    greedy=Tolerance(None, "greedy text parts at the first near tie; reported only"),
)
_INT4 = {
    "weights": Tolerance(
        0.5, "the scale that is best for a block may clip its largest elements, code -10 to -8 or 10 to 7: 20 or 30 %, more "
        "where one outlier stands among many small ones; measured 0.2"
    ),
    "kl_mean": Tolerance(0.05, "4-bit weights: measured 6e-3 nats on the example; the project's promise"),
    "top1": Tolerance(0.9, "the project's promise; near ties of the best two tokens fall the other way; measured 0.94", ">="),
    "perplexity": Tolerance(0.05, "mean KL of 0.05 nats bounds the change of log-perplexity to about 5 %; measured 0.24 %"),
}  # fmt: skip
INT4_EXACT = replace(INT8_EXACT, name="int4, exact", **_INT4)
INT4_FAST = replace(INT8_FAST, name="int4, fast", **_INT4)
_ROUNDED = {
    "exact_logits": Tolerance(None, "a routing flip moves single logits by units; the distribution is judged"),
    "routed_logits": Tolerance(None, "as exact logits"),
    "greedy": Tolerance(None, "greedy text parts at the first near tie; reported only"),
}
BF16 = replace(
    FP32,
    **_ROUNDED,
    name="bf16",
    plain_weights=Tolerance(2**-8, "rounding to 8 bits, 7 of them stored; 0 where the checkpoint is bf16"),
    exact_kl=Tolerance(1e-3, "0.16 % a rounding, some dozen a layer, and flips; measured 3e-4 nats; a wrong norm gives 2e-3"),
    layer=Tolerance(0.02, "some dozen roundings of 0.16 % add to 0.6 %, which is measured; sharp softmax rows triple it"),
    token=Tolerance(0.08, "four times a layer's: one token's roundings do not average out; measured 2.4 %"),
    kl_mean=Tolerance(2e-3, "as exact KL, once more for weights that were float32"),
    top1=Tolerance(0.975, "near ties of the best two tokens fall the other way; measured 0.99", ">="),
    perplexity=Tolerance(5e-3, "rounding averages out over the text; measured 1e-3"),
)
FP8 = replace(
    BF16,
    name="fp8",
    weights=Tolerance(
        1.01 * 16 / 448, "e4m3: a row's largest element becomes 448, steps below are 32, off by half of one; 1 % for rounding"
    ),
    exact_kl=Tolerance(6e-3, "activations in e4m3, 2.5 % a product; measured 2.4e-3 nats; a wrong softmax scale gives 3e-2"),
    layer=Tolerance(0.06, "2.5 % a product, measured 2 to 3 % a layer, whose residual carries most of the rest"),
    token=Tolerance(0.25, "3 or 4 products in a row: 5 %, twice that where softmax is sharp; measured 10 to 12 %; doubled"),
    kl_mean=Tolerance(0.01, "weights and activations in e4m3: measured 3.4e-3 to 4.9e-3 nats; the project's promise"),
    top1=Tolerance(0.92, "measured 0.95 with dynamic and static scales", ">="),
    perplexity=Tolerance(0.015, "mean KL of 0.01 nats bounds the change of log-perplexity to about 1 %; measured 0.5 %"),
)
_INT4_EXPERTS = _INT4 | {  # layers and the engine on its own weights are held to what the rest's precision allows
    "kl_mean": Tolerance(0.05, "4-bit experts: measured 2.2e-3 nats beside bf16, 5.0e-3 beside fp8; the promise for int4"),
    "top1": Tolerance(0.9, "the promise for int4; measured 0.965 beside bf16, 0.944 beside fp8", ">="),
    "perplexity": Tolerance(0.05, "as int4 on the CPU; measured 0.1 % beside bf16, 0.4 % beside fp8"),
}
FP8_INT4 = replace(FP8, name="fp8-int4", **_INT4_EXPERTS)
BF16_INT4 = replace(BF16, name="bf16-int4", **_INT4_EXPERTS)
_FLOAT16_CACHE = {
    "exact_logits": Tolerance(None, "the cache rounds latents to 11 bits: single logits move; the distribution is judged"),
    "exact_kl": Tolerance(1e-3, "rounding to 11 bits moves logits by about 1e-2; measured 1e-5 nats with flips"),
    "layer": Tolerance(5e-3, "2^-11 = 5e-4 on latents and keys, amplified up to tenfold by sharp softmax rows"),
    "token": Tolerance(0.02, "four times a layer's; measured 2e-3"),
    "routed_logits": Tolerance(0.1, "11-bit latents in every layer; measured 1e-2"),
    "greedy": Tolerance(None, "near ties at 1e-2; reported only"),
    "kl_mean": Tolerance(1e-3, "as exact KL: the weights lose nothing"),
    "top1": Tolerance(0.995, "near ties of the two best tokens at 1e-2; measured 0.9998", ">="),
    "perplexity": Tolerance(1e-3, "as exact KL"),
}


def _packed_cache(kl: float, top1: float, layer: float, token: float) -> dict[str, Tolerance]:
    """What an engine of int8 weights was measured at on the example, with room for other text; int4's own limits are wider."""
    return {
        "exact_logits": Tolerance(None, "rounded tokens move single logits, and flip experts; the distribution is judged"),
        "routed_logits": Tolerance(None, "as exact logits"),
        "greedy": Tolerance(None, "greedy text parts at the first near tie; reported only"),
        "exact_kl": Tolerance(2 * kl, f"cached tokens are rounded in every layer; measured {kl:g} nats; doubled"),
        "kl_mean": Tolerance(2 * kl, f"as exact KL, with what the weights cost; measured {kl:g}"),
        "top1": Tolerance(top1 - 0.02, f"near ties of the two best tokens fall the other way; measured {top1:g}", ">="),
        "layer": Tolerance(2 * layer, f"attention over rounded tokens, into the residual; measured {layer:g}; doubled"),
        "token": Tolerance(2 * token, f"a layer's, for one token's roundings alone; measured {token:g}; doubled"),
        "perplexity": Tolerance(4 * kl, "mean KL bounds the expected change of log-perplexity; doubled"),
    }


_CACHES = {
    "float16": _FLOAT16_CACHE,
    "fp8": _packed_cache(0.0012, 0.974, 0.020, 0.062),
    "int6": _packed_cache(0.0012, 0.977, 0.020, 0.073),
    "int6r": _packed_cache(0.0028, 0.963, 0.048, 0.145),
    "int4": _packed_cache(0.0039, 0.953, 0.066, 0.179),
}


def find(precision: str, accuracy: str, cache_format: str) -> Tolerances:
    """The row for a target's precision, accuracy and cache format. Raises KeyError that lists the choices."""
    rows = {"fp32": FP32, "int8 exact": INT8_EXACT, "int8 fast": INT8_FAST, "int4 exact": INT4_EXACT,
            "int4 fast": INT4_FAST, "bf16": BF16, "fp8": FP8, "bf16-int4": BF16_INT4, "fp8-int4": FP8_INT4}  # fmt: skip
    key = f"{precision} {accuracy}" if precision in ("int8", "int4") else precision
    if key not in rows:
        raise KeyError(f"no tolerances for precision {key!r}, known: {', '.join(rows)}")
    own = "bfloat16" if key.startswith(("bf16", "fp8")) else "float32"  # what the row itself is for
    packed = {name: row for name, row in _CACHES.items() if name != "float16"}
    others = packed if own == "bfloat16" else _CACHES
    if cache_format not in (own, *others):
        raise KeyError(f"no tolerances for {key} with cache format {cache_format!r}, known: {', '.join((own, *others))}")
    if cache_format == own:
        return rows[key]
    row = rows[key]
    looser = {k: v for k, v in others[cache_format].items() if _is_looser(v, getattr(row, k))}
    return replace(row, name=f"{row.name}, {cache_format} cache", **looser)


def _is_looser(new: Tolerance, old: Tolerance) -> bool:
    if new.limit is None or old.limit is None:
        return old.limit is not None
    return new.limit > old.limit if new.sense == "<=" else new.limit < old.limit
