"""Recipes: files that say which modules a quantized build leaves as they are.

    plain = ["model.layers.1.mlp.down_proj", "model.layers.*.self_attn.o_proj", "model.layers.3.mlp.experts.*"]

Patterns are those of shells (`*` also stands for dots), over the checkpoint's own names of modules. A layer's routed experts
are stored together: they stay plain together, or not at all. `latentrt rank` writes such files.
"""

import tomllib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

from latentrt.export.errors import BuildError
from latentrt.export.models.base import Weight

EXPERTS = ("gate_up", "down")  # roles of what routed experts are made of
PRODUCTS = ("linear", "head", "absorbed", *EXPERTS)


def read(path: Path) -> tuple[str, ...]:
    """The patterns of a recipe. BuildError names the file, what was found, and what is accepted."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BuildError(f"recipe {path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BuildError(f"recipe {path}: not valid TOML ({error})") from None
    unknown = [key for key in content if key != "plain"]
    if unknown or "plain" not in content:
        found = ", ".join(content) or "nothing"
        raise BuildError(f'recipe {path}: has {found}; accepted: plain, a list of modules, as in plain = ["lm_head"]')
    patterns = content["plain"]
    if not isinstance(patterns, list) or not all(isinstance(p, str) and p for p in patterns):
        raise BuildError(f"recipe {path}: plain is {patterns!r}; accepted: a list of names of modules, in quotes")
    return tuple(dict.fromkeys(patterns))


def modules(weight: Weight) -> list[str]:
    """The checkpoint's modules that a weight is made of, first its own, then what only scales it."""
    return [name.removesuffix(".weight") for group in weight.sources for name in group]


@lru_cache(maxsize=1 << 16)
def _matches(patterns: tuple[str, ...], module: str) -> bool:
    return any(fnmatchcase(module, pattern) for pattern in patterns)


def keeps(patterns: tuple[str, ...], weight: Weight) -> bool:
    """Whether a recipe leaves `weight` plain; `check` has seen to it that one of its modules stands for all."""
    return bool(patterns) and _matches(patterns, modules(weight)[0])


def check(patterns: tuple[str, ...], weights: Iterable[Weight], quantized: Iterable[str] = PRODUCTS) -> None:
    """BuildError for a pattern that no weight of the roles `quantized` fits, or that parts what is stored together."""
    roles, used, parted = set(quantized), set(), {}
    for weight in weights:
        if weight.role not in roles:
            continue
        own = [group[:2] if weight.role == "gate_up" else group[:1] for group in weight.sources]
        names = [name.removesuffix(".weight") for group in own for name in group]
        chosen = [_matches(patterns, name) for name in names]
        used |= {p for p in patterns if any(fnmatchcase(name, p) for name in names)}
        if weight.role in EXPERTS:
            parted.setdefault(weight.name.rpartition(".")[0], []).extend(chosen)
    for experts, chosen in parted.items():
        if any(chosen) and not all(chosen):
            raise BuildError(
                f"recipe: names {sum(chosen)} of the {len(chosen)} matrices of {experts}, which are stored together; "
                f'name all of them, with "{experts}.*", or none'
            )
    unused = [pattern for pattern in patterns if pattern not in used]
    if unused:
        raise BuildError(f"recipe: {unused[0]!r} names no weight that this precision quantizes; {_helps(unused[0], weights)}")


def _helps(pattern: str, weights: Iterable[Weight]) -> str:
    ending = pattern.rpartition(".")[2]
    products = [w for w in weights if w.role in PRODUCTS]
    near = [m for w in products for m in modules(w)[:1] if m.endswith(f".{ending}")] or [modules(w)[0] for w in products]
    return f"there is, for example, {near[0]!r}" if near else "leave it out"
