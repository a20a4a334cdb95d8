"""Weight formats: one file each. A format says which tensors a weight becomes, and encodes and decodes its slabs."""

from export.quantization.base import StoredTensor, WeightFormat
from export.quantization.bf16 import BFloat16
from export.quantization.float32 import Float32
from export.quantization.fp8 import Fp8
from export.quantization.int8 import Int8

__all__ = ["BFloat16", "Float32", "Fp8", "Int8", "StoredTensor", "WeightFormat"]
