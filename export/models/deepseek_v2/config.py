"""The configuration of a DeepSeek-V2-family checkpoint: config.json, read strictly.

Field names are the checkpoint's. A field that shapes the model must be there; nothing is inferred from a name or a size.
The few defaults are those of the family's own configuration class, for fields that transformers leaves out on saving.
"""

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from latentrt.export.errors import ConfigError

Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
_STRICT = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)
_YARN_FIELDS = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
_ROPE_IGNORED = {"type", "rope_type", "rope_theta"}


class RopeConfig(BaseModel):
    """Rotary position embedding. `factor` and the rest matter for rope_type "yarn" only (arXiv 2309.00071)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    rope_type: Literal["default", "yarn"]
    rope_theta: Annotated[float, Field(gt=1)]
    factor: Annotated[float, Field(ge=1)] = 1.0
    original_max_position_embeddings: PositiveInt | None = None
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: Annotated[float, Field(ge=0)] | None = None
    mscale_all_dim: Annotated[float, Field(ge=0)] | None = None

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by: mscale(factor, mscale) / mscale(factor, mscale_all_dim)."""
        if self.rope_type == "default":
            return 1.0
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)

    def softmax_scale(self, qk_head_dim: int) -> float:
        """qk_head_dim^-0.5, times mscale(factor, mscale_all_dim)^2 under YaRN."""
        scale = qk_head_dim**-0.5
        if self.rope_type == "yarn" and self.mscale_all_dim:
            scale *= yarn_mscale(self.factor, self.mscale_all_dim) ** 2
        return scale

    def inv_freq(self, dim: int) -> list[float]:
        """Inverse frequencies [dim / 2]; YaRN blends interpolated and original ones between two correction dimensions."""
        original = [self.rope_theta ** (-2 * i / dim) for i in range(dim // 2)]
        if self.rope_type == "default":
            return original
        low = max(math.floor(self._correction_dim(self.beta_fast, dim)), 0)
        high = min(math.ceil(self._correction_dim(self.beta_slow, dim)), dim - 1)
        span = high - low or 0.001
        blend = [min(max((i - low) / span, 0.0), 1.0) for i in range(dim // 2)]
        return [f / self.factor * b + f * (1 - b) for f, b in zip(original, blend, strict=True)]

    def _correction_dim(self, rotations: float, dim: int) -> float:
        length = self.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(self.rope_theta))


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 * mscale * ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


class DeepseekV2Config(BaseModel):
    """What the model definition needs of config.json. Immutable; see `parse`."""

    model_type: ClassVar[str] = "deepseek_v2"
    model_config = _STRICT

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    moe_intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    q_lora_rank: PositiveInt | None
    kv_lora_rank: PositiveInt
    qk_nope_head_dim: PositiveInt
    qk_rope_head_dim: PositiveInt
    v_head_dim: PositiveInt
    n_routed_experts: PositiveInt
    n_shared_experts: Count | None
    num_experts_per_tok: PositiveInt
    first_k_dense_replace: Count
    moe_layer_freq: PositiveInt = 1
    topk_method: Literal["greedy", "group_limited_greedy"]
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    n_group: PositiveInt | None
    topk_group: PositiveInt | None
    norm_topk_prob: bool
    routed_scaling_factor: PositiveFloat
    rms_norm_eps: PositiveFloat
    max_position_embeddings: PositiveInt
    hidden_act: Literal["silu"]
    attention_bias: bool = False
    mlp_bias: Literal[False] = False
    tie_word_embeddings: bool = False
    eos_token_id: int | list[int] | None = None
    rope: RopeConfig

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        return self.rope.softmax_scale(self.qk_head_dim)

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the shared experts taken as one MLP; 0 if there are none."""
        return self.moe_intermediate_size * (self.n_shared_experts or 0)

    def is_moe_layer(self, layer: int) -> bool:
        """Layers from first_k_dense_replace on, every moe_layer_freq-th of all."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @model_validator(mode="after")
    def _check(self) -> "DeepseekV2Config":
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim is {self.qk_rope_head_dim}, must be even: RoPE turns pairs")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, more than n_routed_experts ({self.n_routed_experts})"
            )
        if self.topk_method == "group_limited_greedy":
            self._check_groups()
        if self.norm_topk_prob and self.routed_scaling_factor != 1.0:
            raise ValueError(
                f"norm_topk_prob is true and routed_scaling_factor is {self.routed_scaling_factor}: DeepSeek-V2's own code "
                "drops the factor in this case and later engines apply it, so the result is not defined; "
                "set routed_scaling_factor to 1.0 or norm_topk_prob to false"
            )
        return self

    def _check_groups(self) -> None:
        if self.n_group is None or self.topk_group is None:
            raise ValueError("topk_method is group_limited_greedy, which needs n_group and topk_group")
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_routed_experts ({self.n_routed_experts}) is not a multiple of n_group ({self.n_group})")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group is {self.topk_group}, more than n_group ({self.n_group})")


def parse(raw: dict) -> DeepseekV2Config:
    """The config that config.json's content describes. Raises ConfigError. `registry.parse` comes before it."""
    heads, kv_heads = raw.get("num_attention_heads"), raw.get("num_key_value_heads")
    if kv_heads is not None and heads is not None and kv_heads != heads:
        raise ConfigError(f"num_key_value_heads is {kv_heads!r}, must equal num_attention_heads ({heads!r}) in MLA")
    return restore({k: v for k, v in raw.items() if k != "rope"} | {"rope": _rope_fields(raw)})


def restore(fields: dict) -> DeepseekV2Config:
    """The config with these fields, as `model_dump` gives them. Raises ConfigError."""
    try:
        return DeepseekV2Config.model_validate(fields)
    except ValidationError as error:
        raise ConfigError("; ".join(_describe(e) for e in error.errors())) from None


def _rope_fields(raw: dict) -> dict:
    """RoPE in any of its spellings: rope_scaling with "type" or "rope_type", or transformers 5's rope_parameters."""
    name = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    scaling = raw.get(name) or {}
    if not isinstance(scaling, dict):
        raise ConfigError(f"{name} is {scaling!r}, expected an object or null")
    if name == "rope_parameters" and raw.get("rope_scaling") not in (None, {}, scaling):
        raise ConfigError("rope_parameters and rope_scaling are both given and differ; keep one")
    theta, kind = _rope_theta(raw, scaling), _rope_type(name, scaling)
    fields = {k: v for k, v in scaling.items() if k not in _ROPE_IGNORED and v is not None}
    if kind == "yarn":
        missing = {"factor", "original_max_position_embeddings"} - set(fields)
        if missing:
            raise ConfigError(f"{name}: yarn needs {', '.join(sorted(missing))}")
    unknown = set(fields) - _YARN_FIELDS
    if unknown:
        raise ConfigError(
            f"{name}: unknown fields {', '.join(sorted(unknown))}, accepted: {', '.join(sorted(_YARN_FIELDS))}"
        )
    if kind == "default" and fields:
        raise ConfigError(f"{name}: rope type is default, yet {', '.join(sorted(fields))} are given")
    return {"rope_type": kind, "rope_theta": theta} | fields


def _rope_theta(raw: dict, scaling: dict) -> Any:
    found = [place["rope_theta"] for place in (scaling, raw) if place.get("rope_theta") is not None]
    if not found:
        raise ConfigError("rope_theta is missing (top level, or in rope_parameters)")
    if found[0] != found[-1]:
        raise ConfigError(f"rope_theta is {found[-1]!r} at the top level and {found[0]!r} beside the rope type; keep one")
    return found[0]


def _rope_type(name: str, scaling: dict) -> str:
    kinds = [scaling[k] for k in ("type", "rope_type") if k in scaling] if scaling else ["default"]
    if not kinds or kinds[0] != kinds[-1]:
        raise ConfigError(f'{name} must name one rope type ("type" or "rope_type"), found {kinds}')
    if kinds[0] not in ("default", "yarn"):
        raise ConfigError(f"{name}: rope type is {kinds[0]!r}, accepted: 'default', 'yarn'")
    return kinds[0]


def _describe(error: dict) -> str:
    where = ".".join(map(str, error["loc"]))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{where} is missing"
    return f"{where} is {error['input']!r}: {message}" if where else message
