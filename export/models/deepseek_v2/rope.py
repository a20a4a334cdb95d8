"""RoPE of a DeepSeek-V2-family checkpoint: its fields in config.json, in any of their spellings, and its numbers."""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from latentrt.export.errors import ConfigError
from latentrt.export.models.base import Note

PositiveFloat = Annotated[float, Field(gt=0)]
DEFAULT, LINEAR, DYNAMIC, YARN = "default", "linear", "dynamic", "yarn"
_THETA = 10000.0  # of transformers, where config.json is silent
_TYPES = {DEFAULT: DEFAULT, LINEAR: LINEAR, DYNAMIC: DYNAMIC, YARN: YARN, "deepseek_yarn": YARN}  # the last is vLLM's name
_FIELDS = {
    DEFAULT: set(), LINEAR: {"factor", "mscale_all_dim"}, DYNAMIC: {"factor", "mscale_all_dim"},
    YARN: {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
           "attention_factor", "truncate"},
}  # fmt: skip
_SPELLINGS = ("rope_scaling", "rope_parameters")


class RopeConfig(BaseModel):
    """Rotary position embedding, with the numbers of transformers.

    "linear" divides all frequencies by `factor`. "dynamic" turns as "default" does up to max_position_embeddings, and no
    engine goes beyond. "yarn": arXiv 2309.00071.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True)

    rope_type: Literal["default", "linear", "dynamic", "yarn"]
    rope_theta: Annotated[float, Field(gt=1)]
    factor: Annotated[float, Field(ge=1)] = 1.0
    original_max_position_embeddings: PositiveInt | None = None
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: Annotated[float, Field(ge=0)] | None = None
    mscale_all_dim: Annotated[float, Field(ge=0)] | None = None
    given_attention_factor: Annotated[PositiveFloat | None, Field(alias="attention_factor")] = None
    truncate: bool = True

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by: what is given, else mscale(factor, mscale) / mscale(factor, mscale_all_dim)."""
        if self.rope_type != YARN:
            return 1.0
        if self.given_attention_factor is not None:
            return self.given_attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)

    def softmax_scale(self, qk_head_dim: int) -> float:
        """qk_head_dim^-0.5, times mscale(factor, mscale_all_dim)^2 where RoPE is scaled."""
        scale = qk_head_dim**-0.5
        if self.rope_type != DEFAULT and self.mscale_all_dim:
            scale *= yarn_mscale(self.factor, self.mscale_all_dim) ** 2
        return scale

    def inv_freq(self, dim: int) -> list[float]:
        """Inverse frequencies [dim / 2]; YaRN blends interpolated and original ones between two correction dimensions."""
        original = [self.rope_theta ** (-2 * i / dim) for i in range(dim // 2)]
        if self.rope_type != YARN:
            return [f / self.factor for f in original] if self.rope_type == LINEAR else original
        low, high = (self._correction_dim(rotations, dim) for rotations in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        span = high - low or 0.001
        blend = [min(max((i - low) / span, 0.0), 1.0) for i in range(dim // 2)]
        return [f / self.factor * b + f * (1 - b) for f, b in zip(original, blend, strict=True)]

    def _correction_dim(self, rotations: float, dim: int) -> float:
        length = self.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(self.rope_theta))


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 * mscale * ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def fields(raw: dict, max_position_embeddings: Any, note: Note) -> dict:
    """RopeConfig's fields from config.json: rope_scaling with "type" or "rope_type", or transformers 5's rope_parameters."""
    name, scaling = _scaling(raw)
    theta, kind = _theta(raw, scaling), _kind(name, scaling)
    known = _FIELDS[kind]
    found = {k: v for k, v in scaling.items() if k in known and v is not None}
    ignored = set(scaling) - known - {"type", "rope_type", "rope_theta"}
    if "factor" in ignored and not {"type", "rope_type"} & set(scaling):
        raise ConfigError(f'{name} has a factor and no rope type: add "rope_type": {YARN!r} (or {LINEAR!r}, or {DYNAMIC!r})')
    if ignored:
        note(f"{name}: {', '.join(sorted(ignored))} play no role for rope type {kind}, as in transformers")
    if kind != DEFAULT and "factor" not in found:
        raise ConfigError(f"{name}: {kind} needs factor")
    if kind == YARN:
        length = _one(name, "original_max_position_embeddings", scaling, raw)
        if length is None:
            note(f"{name}: original_max_position_embeddings is missing, max_position_embeddings is taken, as in transformers")
        found["original_max_position_embeddings"] = max_position_embeddings if length is None else length
    return {"rope_type": kind, "rope_theta": theta} | found


def _scaling(raw: dict) -> tuple[str, dict]:
    """The field that describes RoPE, and its content. Both spellings may be there if they mean the same."""
    given = {name: raw[name] for name in _SPELLINGS if raw.get(name)}
    for name, content in given.items():
        if not isinstance(content, dict):
            raise ConfigError(f"{name} is {content!r}, expected an object or null")
    if len(given) == 2:
        meant = [_meaning(raw, name, content) for name, content in given.items()]
        if meant[0] != meant[1]:
            differ = sorted(k for k in meant[0] | meant[1] if meant[0].get(k) != meant[1].get(k))
            raise ConfigError(f"rope_scaling and rope_parameters are both given and differ in {', '.join(differ)}; keep one")
    return next(iter(given.items()), ("rope_scaling", {}))


def _meaning(raw: dict, name: str, content: dict) -> dict:
    """A spelling's content without what is only another way to say it."""
    kept = {k: v for k, v in content.items() if k not in ("type", "rope_type", "rope_theta") and v is not None}
    return kept | {"type": _kind(name, content), "rope_theta": _theta(raw, content)}


def _theta(raw: dict, scaling: dict) -> Any:
    found = _one("rope_scaling or rope_parameters", "rope_theta", scaling, raw)
    return _THETA if found is None else found


def _one(name: str, field: str, scaling: dict, raw: dict) -> Any:
    """A field that may stand beside the rope type and at the top level; None if it is nowhere."""
    found = [place[field] for place in (scaling, raw) if place.get(field) is not None]
    if found and found[0] != found[-1]:
        raise ConfigError(f"{field} is {found[-1]!r} at the top level and {found[0]!r} in {name}; keep one")
    return found[0] if found else None


def _kind(name: str, scaling: dict) -> str:
    kinds = [scaling[k] for k in ("type", "rope_type") if scaling.get(k) is not None] or [DEFAULT]
    accepted = ", ".join(map(repr, _TYPES))
    if any(not isinstance(k, str) or k not in _TYPES for k in kinds):
        raise ConfigError(f"{name}: rope type is {kinds[0]!r}, accepted: {accepted}")
    if _TYPES[kinds[0]] != _TYPES[kinds[-1]]:
        raise ConfigError(f'{name} must name one rope type ("type" or "rope_type"), found {kinds}')
    return _TYPES[kinds[0]]
