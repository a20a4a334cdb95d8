"""Cache formats: how one token's latent (kv_lora_rank elements) and k_pe (qk_rope_head_dim) lie in a page.

One file per kind. base.py says what a format answers.
"""

from latentrt.plugins.cache_formats import fp8, integers, plain
from latentrt.plugins.cache_formats.base import CacheFormat, Field

__all__ = ["ELEMENTS", "FORMATS", "NAMES", "PACKED", "CacheFormat", "Field", "get"]

FORMATS: dict[str, CacheFormat] = {f.name: f for f in (*plain.FORMATS, *fp8.FORMATS, *integers.FORMATS)}
NAMES = tuple(FORMATS)
PACKED = tuple(name for name, f in FORMATS.items() if f.kernel != "plain")
ELEMENTS = tuple(dict.fromkeys(f.element for f in FORMATS.values()))  # types of caches, in torch's words


def get(name: str) -> CacheFormat:
    """The format called `name`; ValueError lists the choices."""
    if name not in FORMATS:
        raise ValueError(f"unknown cache format {name!r}, accepted: {', '.join(NAMES)}")
    return FORMATS[name]
