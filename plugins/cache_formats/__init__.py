"""Cache formats: how one token's latent (kv_lora_rank elements) and k_pe (qk_rope_head_dim) lie in a page.

One file per kind. A format answers: element dtype, elements per token, encode, decode.
"""

from latentrt.plugins.cache_formats.plain import PLAIN_FORMATS, CacheFormat

FORMATS: dict[str, CacheFormat] = {f.name: f for f in PLAIN_FORMATS}
NAMES = tuple(FORMATS)
DTYPES = tuple({f.dtype: None for f in FORMATS.values()})


def get(name: str) -> CacheFormat:
    """The format called `name`; ValueError lists the choices."""
    if name not in FORMATS:
        raise ValueError(f"unknown cache format {name!r}, accepted: {', '.join(NAMES)}")
    return FORMATS[name]
