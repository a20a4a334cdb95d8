"""Recipes: which modules stay plain in a build whose precision quantizes weights. A recipe is a small TOML file:

    plain = ["model.layers.0.mlp.down_proj", "model.layers.*.self_attn.o_proj"]

Patterns are globs over the checkpoint's names of modules; `*` also crosses dots. All routed experts of a layer are one module,
model.layers.<i>.mlp.experts, and kv_b_proj is one, however the graph splits it. No torch: a build checks recipes first.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from latentrt.export.errors import BuildError

if TYPE_CHECKING:
    from latentrt.export.models.base import Weight

_EXPERTS = ("gate_up", "down")
QUANTIZED_ROLES = {  # precision -> roles that its weight format quantizes; export/quantization/ has the formats
    "fp8": ("linear", *_EXPERTS),
    "int8": ("linear", "head", "absorbed", *_EXPERTS),
    "int4": ("linear", "head", "absorbed", *_EXPERTS),
    "fp8-int4": ("linear", *_EXPERTS),
    "bf16-int4": _EXPERTS,
}
_EXAMPLE = 'plain = ["model.layers.0.mlp.down_proj", "model.layers.*.self_attn.o_proj"]'


@dataclass(frozen=True)
class Recipe:
    """Patterns of modules that stay plain, and the file that said so."""

    file: Path
    patterns: tuple[str, ...]

    def modules(self, weights: Iterable[Weight], precisions: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Modules that stay plain, by precision, in the model's order. BuildError for a pattern that matches none in any."""
        weights, found = list(weights), {}
        for precision in precisions:
            names = quantizable(weights, precision)
            found[precision] = tuple(n for n in names if any(fnmatchcase(n, pattern) for pattern in self.patterns))
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for names in found.values() for name in names):
                raise BuildError(f"recipe {self.file}: {_unmatched(pattern, weights, list(found))}")
        return found


def quantizable(weights: Iterable[Weight], precision: str) -> list[str]:
    """Modules whose weights this precision quantizes, in the model's order; none where it quantizes nothing."""
    roles = QUANTIZED_ROLES.get(precision, ())
    return list(dict.fromkeys(weight.module for weight in weights if weight.role in roles))


def read(file: Path | str) -> Recipe:
    """The recipe in a file. BuildError that names the file for what cannot be read, unknown keys and wrong types."""
    file = Path(file)
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BuildError(f"recipe {file}: cannot be read ({error.strerror}); give a TOML file such as: {_EXAMPLE}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BuildError(f"recipe {file}: is no TOML ({error}); accepted: {_EXAMPLE}") from None
    strangers = [key for key in content if key != "plain"]
    if strangers:
        raise BuildError(f"recipe {file}: has the key {strangers[0]!r}, accepted: plain, as in {_EXAMPLE}")
    patterns = content.get("plain")
    if not isinstance(patterns, list) or not patterns:
        raise BuildError(f"recipe {file}: plain is {_shown(patterns)}, accepted: a list of patterns, at least one: {_EXAMPLE}")
    wrong = [p for p in patterns if not isinstance(p, str) or not p]
    if wrong:
        raise BuildError(f"recipe {file}: plain holds {_shown(wrong[0])}, accepted: names of modules, with * for any part")
    return Recipe(file, tuple(patterns))


def write(file: Path, patterns: Iterable[str], comments: Iterable[str] = ()) -> None:
    """Writes a recipe with lines of comment above it. Names of modules need no escapes."""
    lines = [*(f"# {line}" for line in comments), "plain = [", *(f'    "{pattern}",' for pattern in patterns), "]"]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def digest(modules: Iterable[str]) -> str:
    """Tells apart sets of plain modules, whatever patterns chose them."""
    return hashlib.sha256("\n".join(sorted(modules)).encode()).hexdigest()[:12]


def _unmatched(pattern: str, weights: list[Weight], precisions: list[str]) -> str:
    """Why a pattern matches nothing, and what helps."""
    found, named = f"the pattern {pattern!r} matches", f"precision {' or '.join(precisions)}"
    plain = next((w for w in weights if fnmatchcase(w.module, pattern)), None)
    if plain:
        return f"{found} only weights that {named} never quantizes, such as {plain.module} ({plain.role}); take it out"
    single = next((w for w in weights if w.role in _EXPERTS for g in w.sources for name in g if _names(pattern, name)), None)
    if single:
        return f"{found} single experts, and a layer's experts have one format; write {single.module!r} for all of them"
    names = dict.fromkeys(name for precision in precisions for name in quantizable(weights, precision))
    close = get_close_matches(pattern.removesuffix(".weight"), names, n=3, cutoff=0.5) or list(names)[:3]
    return f"{found} no module that {named} quantizes; there are {len(names)}, such as {', '.join(close)}"


def _names(pattern: str, tensor: str) -> bool:
    return fnmatchcase(tensor.removesuffix(".weight"), pattern) or fnmatchcase(tensor, pattern)


def _shown(value) -> str:
    return "missing" if value is None else f"{str(value)[:40]!r} ({type(value).__name__})"
