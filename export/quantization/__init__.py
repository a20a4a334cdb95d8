"""Weight formats: one file each. A format says which tensors a weight becomes, encodes, decodes, describes itself."""

from collections.abc import Mapping

from latentrt.export.quantization.base import StoredTensor, WeightFormat
from latentrt.export.quantization.bf16 import BFloat16
from latentrt.export.quantization.float32 import Float32
from latentrt.export.quantization.fp8 import Fp8
from latentrt.export.quantization.int4 import Int4
from latentrt.export.quantization.int4_experts import BFloat16Int4, Fp8Int4
from latentrt.export.quantization.int8 import Int8
from latentrt.export.quantization.panels import Panels

__all__ = [
    "BFloat16", "BFloat16Int4", "Float32", "Fp8", "Fp8Int4", "Int4", "Int8", "Panels", "StoredTensor", "WeightFormat",
    "restore",
]  # fmt: skip

FORMATS: dict[str, type[WeightFormat]] = {f.name: f for f in (Float32, BFloat16, Fp8, Int8, Int4, Fp8Int4, BFloat16Int4)}


def restore(description: Mapping) -> WeightFormat:
    """The format that describes itself so. ValueError lists the names, or says what of the description differs here."""
    name = description["name"]
    if name not in FORMATS:
        raise ValueError(f"unknown weight format {name!r}, accepted: {', '.join(FORMATS)}")
    found = FORMATS[name].restored(description).keeping(description["plain_modules"])
    if description["layout"] == Panels.layout:
        found = Panels(found)
    if found.description() != dict(description):
        raise ValueError(f"weight format {name} is described as {dict(description)}, here it is {found.description()}")
    return found
