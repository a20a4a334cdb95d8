"""DeepSeek-V2-family checkpoints as compiled engines: `latentrt.load("BUNDLE").generate(["def main():"])`.

In a checkout the subpackages export, plugins, runtime and validation lie beside this folder; an install puts them inside.
"""

from importlib import import_module
from pathlib import Path

__version__ = "0.2.0"
__all__ = ["BuildOptions", "SamplingParams", "build", "load"]

_HERE = Path(__file__).parent
if not (_HERE / "runtime").is_dir():
    __path__.append(str(_HERE.parent))
_EXPORTED = {  # imported when asked for: a command that only looks into a bundle needs no torch
    "load": "latentrt.runtime.api", "SamplingParams": "latentrt.runtime.sampling_params", "build": "latentrt.builder",
    "BuildOptions": "latentrt.export.options",
}  # fmt: skip


def __getattr__(name: str):
    if name not in _EXPORTED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTED[name]), name)
