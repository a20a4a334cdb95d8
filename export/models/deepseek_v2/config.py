"""The configuration of a DeepSeek-V2-family checkpoint: config.json, read as transformers reads it.

Field names are the checkpoint's. Spellings of one thing are compared by meaning, and refused where they contradict. What is
missing has the default of the family's own configuration class, and the user is told.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from latentrt.export.errors import ConfigError
from latentrt.export.models.base import Note
from latentrt.export.models.deepseek_v2 import rope
from latentrt.export.models.deepseek_v2.rope import RopeConfig

Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
_STRICT = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)
# What transformers' DeepseekV2Config takes where config.json is silent (a test holds them to it).
DEFAULTS = dict(
    vocab_size=102400, hidden_size=4096, intermediate_size=11008, moe_intermediate_size=1407, num_hidden_layers=32,
    num_attention_heads=32, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    n_routed_experts=64, n_shared_experts=2, first_k_dense_replace=0, topk_method="greedy", n_group=None, topk_group=None,
    norm_topk_prob=False, routed_scaling_factor=1.0, rms_norm_eps=1e-6, max_position_embeddings=2048, hidden_act="silu",
    attention_bias=False, mlp_bias=False, tie_word_embeddings=False, rope_theta=10000.0,
)  # fmt: skip
_SILENT = {"attention_bias", "mlp_bias", "tie_word_embeddings", "n_group", "topk_group", "norm_topk_prob"}  # off by default
_NULL_IS_ABSENT = {"norm_topk_prob", "attention_bias", "mlp_bias", "tie_word_embeddings", "moe_layer_freq", "scoring_func",
                   "rope_theta"}  # fmt: skip
_ALIASES = {"n_routed_experts": ("num_experts",)}  # transformers' attribute_map
_ACTIVATIONS = {"swish": "silu"}  # names of the same function in transformers


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


def parse(raw: dict, note: Note = lambda text: None) -> DeepseekV2Config:
    """The config that config.json's content describes. Raises ConfigError. `registry.parse` comes before it."""
    given = {k: v for k, v in raw.items() if k != "rope" and not (v is None and k in _NULL_IS_ABSENT)}
    for field, others in _ALIASES.items():
        spelled = {name: given[name] for name in (field, *others) if given.get(name) is not None}
        if len(set(spelled.values())) > 1:
            raise ConfigError(f"{' and '.join(f'{k} ({v!r})' for k, v in spelled.items())} contradict each other; keep one")
        if spelled:
            given[field] = next(iter(spelled.values()))
    lacking = {k: v for k, v in DEFAULTS.items() if k not in given and k not in _SILENT | {"rope_theta"}}
    if lacking:
        taken = ", ".join(f"{k} {v}" for k, v in lacking.items())
        note(f"says nothing of {taken}: these are the defaults of transformers' DeepseekV2Config")
    fields = DEFAULTS | given
    _check_heads(fields)
    if isinstance(fields["hidden_act"], str):
        fields["hidden_act"] = _ACTIVATIONS.get(fields["hidden_act"], fields["hidden_act"])
    return restore(fields | {"rope": rope.fields(raw, fields["max_position_embeddings"], note)})


def _check_heads(fields: dict) -> None:
    """1 is said by those who count the latent as one shared head, and computes the same."""
    heads, kv_heads = fields["num_attention_heads"], fields.get("num_key_value_heads")
    if kv_heads not in (None, heads, 1):
        raise ConfigError(f"num_key_value_heads is {kv_heads!r}, must equal num_attention_heads ({heads!r}) in MLA")


def restore(fields: dict) -> DeepseekV2Config:
    """The config with these fields, as `model_dump` gives them. Raises ConfigError."""
    try:
        return DeepseekV2Config.model_validate(fields)
    except ValidationError as error:
        raise ConfigError("; ".join(_describe(e) for e in error.errors())) from None


def _describe(error: dict) -> str:
    where = ".".join(map(str, error["loc"]))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{where} is missing"
    return f"{where} is {error['input']!r}: {message}" if where else message
