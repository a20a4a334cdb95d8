"""A cache format's codec as two ONNX functions, which the bodies of the attention ops call.

EncodeCells(latent [T, rank], k_pe [T, rope], like) -> [T, width] in the type of `like`, the cache.
DecodeCells(rows [n, width], like) -> [n, rank + rope] in the type of `like`, the activations.
"""

import onnx

from latentrt.plugins import cache_formats
from latentrt.plugins.onnx_function import BIT_CAST_OPSET, OPSET, FunctionBuilder, OpCall


def functions(call: OpCall) -> list[onnx.FunctionProto]:
    """For the cache format and the sizes of a call of an attention op. The format takes the sizes."""
    layout = cache_formats.get(call.attributes["cache_format"])
    sizes = call.shapes["latent"][-1], call.shapes["k_pe"][-1]
    opset = OPSET if layout.kernel == "plain" else BIT_CAST_OPSET
    encode = FunctionBuilder("EncodeCells", ["latent", "k_pe", "like"], ["rows"], opset=opset)
    rows = layout.encode_onnx(encode, "latent", "k_pe", sizes)
    decode = FunctionBuilder("DecodeCells", ["cells", "like"], ["values"], opset=opset)
    values = layout.decode_onnx(decode, "cells", sizes)
    return [encode.finish(encode("CastLike", rows, "like")), decode.finish(decode("CastLike", values, "like"))]
